"""The adapter of the best evaluation is kept, and training stops when the evaluations stay worse.

Run: pytest tests/train/test_best.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import glm4ft
from glm4ft.diagnosis.run_folder import explain_run
from glm4ft.diagnosis.trainer_logs import ended_by_patience
from glm4ft.errors import ConfigError
from glm4ft.files import write_atomically
from glm4ft.report.observed_run import ObservedRun, train_observed
from glm4ft.train import trainer
from glm4ft.train.best import Best, describe_evaluations, is_exhausted, lowest, read_best
from glm4ft.train.config import TrainConfig
from glm4ft.train.run import run_training

WEIGHTS = "adapter_model.safetensors"


def rows(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * number, "eval_loss": loss} for number, loss in enumerate(losses, 1)]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One conversation to train on and another one to evaluate on: soon learnt by heart, and then worse and worse."""
    folder = tmp_path_factory.mktemp("data")
    lines = (Path(glm4ft.__file__).parent / "demo" / "two_conversations.jsonl").read_text("utf-8").splitlines()
    for name, line in zip(("train", "eval"), lines, strict=True):
        write_atomically(folder / f"{name}.jsonl", line + "\n")
    return {
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "eval.jsonl"),
        "max_steps": 24,
        "eval_every": 2,
        "save_every": 2,
        "keep_checkpoints": 20,
        "max_grad_norm": 0.0,
    }


@pytest.fixture(scope="module")
def stopped(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> ObservedRun:
    output = tmp_path_factory.mktemp("stopped") / "run"
    config = TrainConfig(**options, keep_best=True, patience=2, output=str(output))
    return train_observed(config, say=lambda _: None)


def test_training_stops_after_so_many_evaluations_without_a_new_best(stopped: ObservedRun) -> None:
    evaluations = stopped.trajectory.evaluations
    best = lowest(evaluations)
    assert best is not None
    assert len(stopped.trajectory.steps) == evaluations[-1]["step"] == best.step + 4 < 24
    assert all(row["eval_loss"] >= best.eval_loss for row in evaluations)


def test_adapter_is_that_of_the_best_evaluation(stopped: ObservedRun) -> None:
    """By the checkpoint of the same step, not by the copy that was kept."""
    best = read_best(stopped.output)
    assert best == lowest(stopped.trajectory.evaluations)
    saved, expected = (
        load_file(stopped.output / WEIGHTS),
        load_file(stopped.output / f"checkpoint-{best.step}" / WEIGHTS),
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert [path.name for path in stopped.output.glob("best-*")] == [f"best-{best.step}"]


def test_evaluation_stands_in_the_last_lines_the_report_and_the_card(stopped: ObservedRun) -> None:
    best, last = read_best(stopped.output), stopped.trajectory.evaluations[-1]
    told = (
        f"eld-out loss {last['eval_loss']:.4f} at step {last['step']}; lowest {best.eval_loss:.4f} at step "
        f"{best.step}, whose adapter is kept"
    )
    assert "\nh" + told + "\n" in stopped.describe()
    assert "H" + told in (stopped.output / "report.html").read_text("utf-8")
    assert "whose adapter is kept" in (stopped.output / "README.md").read_text("utf-8")


def test_run_that_its_patience_ended_is_told_as_such(stopped: ObservedRun) -> None:
    """Its training loss was still falling, but it was not asked to go on."""
    best, last = read_best(stopped.output), stopped.trajectory.evaluations[-1]
    assert ended_by_patience(stopped.output) == last["step"]
    told = f"Its own patience ended the run at step {last['step']}: the evaluation loss was lowest at step {best.step}"
    assert stopped.content is not None
    assert stopped.content.headline.text.startswith(told)
    assert stopped.content.headline.tone == "unsure"
    explained = explain_run(stopped.output)
    assert explained.verdict == "stopped-by-patience"
    assert explained.text.startswith(told)


def test_resumed_run_ends_with_the_same_adapter(stopped: ObservedRun, options: dict[str, Any], tmp_path: Path) -> None:
    """Resumed from before the best evaluation, after it, and from the very step at which patience ended."""
    best = read_best(stopped.output)
    expected = load_file(stopped.output / WEIGHTS)
    for step in (best.step - 2, best.step + 2, best.step + 4):
        output = Path(shutil.copytree(stopped.output, tmp_path / f"from-{step}"))
        for name in ("complete", WEIGHTS, "report.html"):
            (output / name).unlink()
        for folder in output.glob("checkpoint-*"):
            if int(folder.name.rpartition("-")[2]) > step:
                shutil.rmtree(folder)
        config = TrainConfig(**options, keep_best=True, patience=2, output=str(output))
        result = run_training(config, resume=True, say=lambda _: None)
        assert [row["step"] for row in result.trajectory.evaluations] == [
            row["step"] for row in stopped.trajectory.evaluations
        ]
        assert read_best(output).step == best.step
        saved = load_file(output / WEIGHTS)
        assert all(torch.equal(saved[name], expected[name]) for name in expected), step


def test_steps_take_time_and_evaluations_none_of_it(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step after an evaluation once took less than no time: its beginning was put after its end."""
    plain = trainer.SupervisedTrainer.get_eval_dataloader

    def slow(self: Any, *arguments: Any) -> Any:
        trainer.time.sleep(1.0)
        return plain(self, *arguments)

    monkeypatch.setattr(trainer.SupervisedTrainer, "get_eval_dataloader", slow)
    config = TrainConfig(**{**options, "max_steps": 4, "save_every": 0}, output=str(tmp_path / "run"))
    steps = run_training(config, say=lambda _: None).trajectory.steps
    assert all(step["step_s"] > 0 for step in steps)
    assert steps[2]["step_s"] < 1.0  # between two evaluations of more than a second each
    assert not any(step["clipped"] for step in steps)  # their norms are above 1, but clipping is off
    assert any(step["grad_norm"] > 1 for step in steps)


def test_without_patience_all_steps_are_run_and_the_last_adapter_stays(options: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(**{**options, "max_steps": 18, "save_every": 0}, output=str(tmp_path / "run"))
    result = train_observed(config, say=lambda _: None)
    assert len(result.trajectory.steps) == 18
    assert ended_by_patience(tmp_path / "run") is None
    assert not (tmp_path / "run" / "best.json").exists()
    assert "which --keep_best true would have kept" in result.describe()


@pytest.mark.parametrize("option", [{"keep_best": True}, {"patience": 3}], ids=str)
def test_without_held_out_conversations_there_is_no_best(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--eval_data"):
        TrainConfig(**option)
    with pytest.raises(ConfigError, match="patience"):
        TrainConfig(eval_data="x", patience=0)


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ((3.0, 2.0, 1.0), 1, False),
        ((3.0, 2.0, 2.0), 1, True),  # as low is no new best
        ((3.0, 2.0, 2.5, 1.9, 2.1), 2, False),
        ((3.0, 2.0, 2.5, 2.1), 2, True),
        ((3.0, 4.0, 5.0), None, False),
        ((3.0, None, None), 2, True),
        ((None, None), 2, True),
        ((), 1, False),
    ],
)
def test_patience_counts_evaluations_since_the_best(
    losses: tuple[float | None, ...], patience: int | None, expected: bool
) -> None:
    assert is_exhausted(rows(*losses), patience) is expected


def test_evaluations_in_one_line() -> None:
    assert describe_evaluations([], None) == ""
    assert describe_evaluations(rows(2.0), None) == "held-out loss 2.0000 at step 10"
    assert describe_evaluations(rows(2.0, 1.0), None) == "held-out loss 1.0000 at step 20, the lowest"
    assert describe_evaluations(rows(1.0, 2.0), Best(10, 1.0)).endswith(
        "lowest 1.0000 at step 10, whose adapter is kept"
    )
    assert describe_evaluations(rows(1.0, None), None) == "held-out loss not finite at step 20"
