"""A recorded run is judged by its own configuration, its data and its dropout; faults of the catalogue are told.

Run: pytest tests/testing/trial/test_recorded.py
All of the catalogue: python tests/sweeps/record_faults.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from glm4ft.cli.main import run
from glm4ft.testing.recording.callback import RecordingCallback
from glm4ft.testing.subjects import transformers_trainer
from glm4ft.testing.trial.judging_callback import VERDICT, JudgingCallback
from glm4ft.testing.trial.recorded import JudgedRecording, judge_recording
from glm4ft.testing.trial.trial import Trial

sys.path.insert(0, str(Path(__file__).parents[2] / "sweeps"))
from record_faults import seen_faults, try_one

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


class Trained(transformers_trainer.Subject):
    """transformers.Trainer, recorded by a callback."""

    lora: Mapping[str, Any] = LORA
    recording: Path | None = None

    def make_trainer(self, model: Any, rows: Any, plan: Mapping[str, Any]) -> Trainer:
        trainer = super().make_trainer(model, rows, plan)
        trainer.add_callback(RecordingCallback(self.recording or ""))
        return trainer


class TwoRates(Trained):
    """The matrices B learn faster than the matrices A, as in LoRA+."""

    def make_trainer(self, model: Any, rows: Any, plan: Mapping[str, Any]) -> Trainer:
        trainer = super().make_trainer(model, rows, plan)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if part in name], "lr": factor * plan["learning_rate"]}
            for part, factor in (("lora_A", 1), ("lora_B", 16))
        ]
        options = {name: plan[name] for name in ("betas", "eps", "weight_decay")}
        trainer.optimizer = torch.optim.AdamW(groups, **options)
        return trainer


def judged(
    healthy: Trial, folder: Path, lora: Mapping[str, Any] = LORA, kind: type[Trained] = Trained, **changes: Any
) -> JudgedRecording:
    """The verdict on a run of transformers.Trainer, with the data that it was given."""
    subject = kind(str(healthy.base_dir))
    subject.lora, subject.recording = lora, folder / "recording"
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(c) + "\n" for c in healthy.conversations), "utf-8")
    plan = {**healthy.run().plan, "steps": 4, "accumulation": 2, "output_dir": str(folder / "run"), **changes}
    subject.train(subject.build_model(str(healthy.base_dir), 0), healthy.conversations, plan)
    return judge_recording(folder / "recording", data=data)


def test_every_stage_is_judged_where_configuration_and_data_are_known(healthy: Trial, tmp_path: Path) -> None:
    """Rows by the data, the schedule by TrainingArguments, and with dropout, whose choices are recorded."""
    lora = {**LORA, "lora_dropout": 0.3}
    found = judged(healthy, tmp_path, lora, schedule="linear", warmup_steps=2, weight_decay=0.1, max_grad_norm=0.05)
    assert found.verdict.departures == {}
    assert found.not_judged == {}
    assert found.about["configuration"]["trainer"]
    assert found.verdict.largest["gradient"] > 0
    assert found.verdict.largest["schedule"] <= 1e-6


@pytest.mark.parametrize(
    ("kind", "more", "not_judged"),
    [
        pytest.param(
            Trained, {"modules_to_save": ["input_layernorm"]}, [], id="norms without decay, as Trainer has them"
        ),
        pytest.param(TwoRates, {}, ["schedule"], id="two rates, as LoRA+ has them"),
    ],
)
def test_update_is_judged_group_by_group(
    healthy: Trial, tmp_path: Path, kind: type[Trained], more: dict[str, Any], not_judged: list[str]
) -> None:
    found = judged(healthy, tmp_path, {**LORA, **more}, kind, weight_decay=0.1, schedule="linear")
    assert found.verdict.departures == {}
    assert list(found.not_judged) == not_judged
    assert found.verdict.largest["update"] <= 1e-5


class Logged(TrainerCallback):
    """A tracker: what TensorBoard's and the others' callbacks receive."""

    def __init__(self) -> None:
        self.texts: list[tuple[int, str]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if VERDICT in logs:
            self.texts.append((state.global_step, logs[VERDICT]))


@pytest.mark.parametrize(("steps", "told_at"), [(2, 3), (4, 4)])
def test_verdict_reaches_the_runs_trackers_once_and_changes_nothing(
    healthy: Trial, tmp_path: Path, steps: int, told_at: int
) -> None:
    """A step after the last recorded one, or at the end of a run that ends with it."""
    base, tracker, results = str(healthy.base_dir), Logged(), []
    plan = {**healthy.run().plan, "steps": 4}
    for callbacks in ([], [JudgingCallback(tmp_path / "recording", steps), tracker]):
        subject = transformers_trainer.Subject(base)
        model = subject.build_model(base, 0)
        rows = [subject.encode(c["messages"], c.get("tools")) for c in healthy.conversations]
        trainer = subject.make_trainer(model, rows, {**plan, "output_dir": str(tmp_path / str(len(callbacks)))})
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        results.append((weights, [entry.get("loss") for entry in trainer.state.log_history]))
    ((step, text),) = tracker.texts
    assert step == told_at
    assert text.startswith(f"{steps} optimizer steps of 1 process")
    assert "gradient  agrees" in text
    (plain, plain_losses), (judged_run, losses) = results
    assert losses == plain_losses
    assert all(torch.equal(plain[name], judged_run[name]) for name in plain)


def test_wrong_row_hides_nothing_that_follows(healthy: Trial, tmp_path: Path) -> None:
    """The later stages are judged on the rows that the run made of its data."""
    trained = judged(healthy, tmp_path).rows
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text("utf-8").replace('"content": "', '"content": "another ', 1), "utf-8")
    found = judge_recording(tmp_path / "recording", data=data)
    assert list(found.verdict.departures) == ["rows"]
    assert found.verdict.hidden == {}
    assert {"model", "gradient"} <= found.verdict.largest.keys()
    assert len(found.rows) == len(trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    "id",
    [
        "assistant-header-trained",
        "truncate-after-padding",
        "mean-of-micro-means",
        "warmup-skipped",
        "l2-in-place-of-decoupled",
        "silent-row-costs-the-whole-step",
    ],
)
def test_fault_in_a_recorded_script_is_told_at_its_stage(id: str) -> None:
    outcome = try_one((id, False, 0))
    assert outcome.is_right, outcome


@pytest.mark.slow
@pytest.mark.parametrize("id", ["healthy", "mean-of-micro-means", "rslora-scale-mixed", "loss-scaling"])
def test_limits_of_low_precision_are_measured_on_the_run(id: str) -> None:
    """Rounding of bf16 is no alarm, and hides neither a wrong loss nor a wrong model."""
    outcome = try_one((id, True, 0))
    assert outcome.is_right, outcome


@pytest.mark.slow
def test_factor_on_the_loss_is_named_in_low_precision() -> None:
    """There even the right gradient is off by the rounding of bf16."""
    outcome = try_one(("fused-loss-assumes-unit-grad", True, 0))
    assert "times the token mean" in outcome.text


@pytest.mark.parametrize("id", ["backward-in-a-closure", "embeddings-handed-over"])
def test_first_step_is_recorded_where_the_loop_begins_it_in_another_way(id: str) -> None:
    """The first forward pass comes inside of the optimizer's step, or begins at the embedding alone."""
    outcome = try_one((id, False, 0))
    assert outcome.is_right, outcome


@pytest.mark.slow
def test_rows_that_are_shifted_in_the_data_raise_no_alarm_beside_one_without_targets() -> None:
    """In a pack, the last target of a row stands at the first position of the next."""
    outcome = try_one(("rows-shifted-in-the-batch", False, 0))
    assert outcome.is_right, outcome


def test_sixty_faults_can_be_seen() -> None:
    assert len(seen_faults()) >= 60


def test_verdict_reaches_report_and_job_summary(
    healthy: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judged(healthy, tmp_path)
    summary = tmp_path / "summary.md"
    summary.write_text("what another step wrote\n", "utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    altered = json.loads((tmp_path / "recording/rank-0/trace.json").read_text("utf-8"))
    altered["configuration"]["learning_rate"] *= 2
    (tmp_path / "recording/rank-0/trace.json").write_text(json.dumps(altered), "utf-8")
    command = ["judge", str(tmp_path / "recording"), "--report", str(tmp_path / "report")]
    assert run(command) == 1
    assert "schedule  DEPARTS" in capsys.readouterr().out
    assert run([*command, "--fail-on", "nothing"]) == 0
    told = summary.read_text("utf-8")
    assert told.startswith("what another step wrote\n")
    assert "first at stage schedule" in told
    assert "first at stage schedule" in (tmp_path / "report" / "report.html").read_text("utf-8")
