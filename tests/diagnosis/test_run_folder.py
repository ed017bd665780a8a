"""A run on the disk is found, whoever trained it, and explained; what it was trained on stays with it.

Run: pytest tests/diagnosis/test_run_folder.py
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm4ft.cli.main import run
from glm4ft.data.encoded_rows import ROWS_FILE, TrainedRow, read_rows, write_rows
from glm4ft.diagnosis.run_folder import explain_run
from glm4ft.model.base_model import load_base
from glm4ft.model.lora import attach_lora
from glm4ft.model.lora_options import LoraOptions
from glm4ft.train.trajectory import FILE_NAME

FALLING = [1.0 + 2.0 * 0.9**i + 0.05 * math.sin(7 * i) for i in range(150)]  # the losses of a run without a fault


@pytest.fixture(scope="module")
def foreign(learnt: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo as another trainer would leave it: an adapter and transformers' own state."""
    folder = tmp_path_factory.mktemp("foreign")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(learnt.output / name, folder)
    log = [
        {"step": s["step"], "loss": s["loss"], "grad_norm": s["grad_norm"], "learning_rate": s["lr"]}
        for s in learnt.trajectory.steps
    ]
    state = {"log_history": [*log, {"train_runtime": 1.0, "step": len(log)}], "train_batch_size": 2}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_run_that_learnt_is_said_to_have_learnt(learnt: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(learnt.output), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["schema"], record["verdict"]) == (1, "learnt")
    assert {"id", "text", "role", "loss", "share", "floor"} <= set(record["tokens"][0])
    assert run(["explain", str(learnt.output)]) == 0
    printed = capsys.readouterr().out
    assert "round trip: 4 of 4 turns came back exactly, 4 stopped" in printed


def test_run_of_another_trainer_is_explained_with_data_and_base(foreign: Path, learnt: Any) -> None:
    diagnosis = explain_run(foreign, data="demo", model=str(learnt.output / "base"))
    assert diagnosis.verdict == "learnt"
    assert [point.loss for point in diagnosis.evidence.curve] == [step["loss"] for step in learnt.trajectory.steps]
    assert all(turn.exact for turn in diagnosis.evidence.round_trips)
    first = diagnosis.evidence.first_loss
    assert first.logged == pytest.approx(first.base, rel=1e-5)


def test_of_a_large_file_only_what_is_looked_at_is_kept(
    foreign: Path, learnt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(learnt.output / "base")
    monkeypatch.setattr("glm4ft.diagnosis.served_rows.KEPT_TOKENS", 1)
    alone = explain_run(foreign, data="demo", model=base)
    assert [row.line for row in alone.evidence.rows] == [1]
    assert alone.evidence.num_rows == 2
    # with the rows as they were trained, the same conversations are there to be compared
    assert explain_run(foreign, data="demo", rows=str(learnt.output / ROWS_FILE), model=base).verdict == "learnt"
    changed = [
        replace(row, input_ids=[*row.input_ids[:2], *row.input_ids]) for row in read_rows(learnt.output / ROWS_FILE)
    ]
    changed = [replace(row, labels=[-100, -100, *row.labels]) for row in changed]
    write_rows(foreign / "changed.jsonl", changed)
    differing = explain_run(foreign, data="demo", rows=str(foreign / "changed.jsonl"), model=base)
    assert [difference.line for difference in differing.evidence.differences] == [1, 2]


def test_rows_that_serving_would_not_send_are_named(foreign: Path, learnt: Any, tmp_path: Path) -> None:
    """The prefix twice, as where rendered text is tokenised with special tokens (open-r1 462)."""
    rows = read_rows(learnt.output / ROWS_FILE)
    doubled = [TrainedRow(r.line, [*r.input_ids[:2], *r.input_ids], [-100, -100, *r.labels]) for r in rows]
    write_rows(tmp_path / "rows.jsonl", doubled)
    base = str(learnt.output / "base")
    diagnosis = explain_run(foreign, data="demo", rows=str(tmp_path / "rows.jsonl"), model=base)
    assert diagnosis.verdict == "not-as-served"
    assert "position 2: trained '[gMASK]<sop>" in diagnosis.findings[0].evidence[0]


def test_adapter_that_no_update_reached_is_called_dead(learnt: Any, tmp_path: Path) -> None:
    base = load_base(str(learnt.output / "base"))
    attach_lora(base.model, LoraOptions(), seed=0).save_pretrained(tmp_path)
    log = [{"step": i, "loss": 8.8, "learning_rate": 1e-3} for i in range(1, 11)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    diagnosis = explain_run(tmp_path, data="demo")
    assert (diagnosis.verdict, diagnosis.stage) == ("adapters-dead", "model")
    assert "All of 12 adapters" in diagnosis.text


def test_run_that_broke_before_it_saved_is_explained_by_its_log(learnt: Any, tmp_path: Path) -> None:
    for name in ("config.yaml", ROWS_FILE):
        shutil.copy(learnt.output / name, tmp_path)
    lines = (learnt.output / FILE_NAME).read_text().splitlines()[:4]
    broken = {**json.loads(lines[-1]), "step": 4, "loss": None, "grad_norm": None, "finite": False}
    (tmp_path / FILE_NAME).write_text("\n".join([*lines, json.dumps(broken)]) + "\n")
    diagnosis = explain_run(tmp_path)
    assert diagnosis.verdict == "numerics"
    assert "first step that is not finite: 4" in diagnosis.findings[0].evidence


def test_run_keeps_its_rows_in_the_form_of_inspect(learnt: Any, tmp_path: Path) -> None:
    assert run(["inspect", "demo", f"--json={tmp_path / 'rows.jsonl'}"]) == 0
    kept, inspected = read_rows(learnt.output / ROWS_FILE), read_rows(tmp_path / "rows.jsonl")
    assert [(r.line, list(r.input_ids), list(r.labels)) for r in kept] == [
        (r.line, list(r.input_ids), list(r.labels)) for r in inspected
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b'{"line": 1, "input_ids": "abc", "labels": [1, 2, 3]}',
        b'{"line": 1, "input_ids": [1, 2], "labels": [1]}',
        b'{"line": 1, "text": "\x1b[2J"}',
        b'{"line": 1, "input_ids": [1, 9999], "labels": [1, 9999]}',
    ],
    ids=["no text", "no numbers", "labels missing", "control characters", "foreign tokens"],
)
def test_rows_that_cannot_be_used_are_refused(
    content: bytes, learnt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert run(["explain", str(learnt.output), f"--rows={tmp_path / 'rows.jsonl'}"]) == 2
    error = capsys.readouterr().err
    assert "not an encoded row" in error or "tokens that the base has no row for" in error
    assert "\x1b" not in error


def test_rows_may_hold_other_keys_with_any_text(tmp_path: Path) -> None:
    """A line separator of Unicode inside of a JSON string ends no line."""
    (tmp_path / "rows.jsonl").write_text(
        '{"line": 1, "input_ids": [1], "labels": [1], "text": "a\u2028b\x85c"}\n', "utf-8"
    )
    assert read_rows(tmp_path / "rows.jsonl") == [TrainedRow(1, [1], [1])]


def test_chat_format_that_the_run_was_given_is_kept(
    learnt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it cannot be chosen from the checkpoint, it had to be named for training, and is known from there on."""
    shutil.copytree(learnt.output, tmp_path / "run")
    template = tmp_path / "run" / "base" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# <think> #}")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("chat_format: null", "chat_format: glm-4-0414"))
    assert run(["explain", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "learnt"


def test_adapter_in_a_pickle_is_refused(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(foreign / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    assert run(["explain", str(tmp_path), "--data=demo", "--model=tiny"]) == 2
    assert "pickle" in capsys.readouterr().err


@pytest.fixture(scope="module")
def log_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write transformers' state of a run that is not there any more."""

    def write(losses: Sequence[float], **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("log")
        log = [{"step": i, "loss": x, "grad_norm": 1.0, "learning_rate": 1e-4} for i, x in enumerate(losses, start=1)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        (folder / "args.json").write_text(json.dumps(options))
        return folder

    return write


def test_log_alone_is_explained_and_says_what_it_was_not_told(
    log_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = log_of(FALLING)
    (folder / "runs" / "Jan01").mkdir(parents=True)
    (folder / "runs" / "Jan01" / "events.out.tfevents.1.host").write_bytes(b"")
    assert run(["explain", str(folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["verdict"] == "trained"
    assert record["looked_at"] == ["trainer_state.json: 150 logged steps, 0 evaluations"]
    assert any("--data" in name for name in record["not_looked_at"])
    assert any("events.out.tfevents" in name for name in record["not_looked_at"])
    assert run(["explain", str(folder)]) == 0
    assert "not looked at: the conversations" in capsys.readouterr().out


def test_losses_of_the_base_times_the_accumulation_steps_are_a_sum(foreign: Path, learnt: Any, tmp_path: Path) -> None:
    """The base's own loss on these rows tells the factor; without its adapter a run may have had another base."""
    base = str(learnt.output / "base")
    shutil.copytree(foreign, tmp_path, dirs_exist_ok=True)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        entry.update({"loss": 16 * entry["loss"]} if "loss" in entry else {})
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    found = explain_run(tmp_path, data="demo", model=base)
    assert found.verdict == "loss-not-a-mean"
    assert "16.0 times the loss that the base itself has" in found.text
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_config.json").unlink()
    alone = explain_run(tmp_path, data="demo", model=base)
    assert alone.verdict == "wrong-start"
    assert alone.evidence.first_loss.base == pytest.approx(found.evidence.first_loss.base)
    assert "accumulation" in alone.text


def test_base_of_another_run_raises_no_alarm(log_of: Callable[..., Path]) -> None:
    """The base's own loss is 8; that of a log which begins at 2 is of another base, or of other rows."""
    found = explain_run(log_of(FALLING), data="demo", model="tiny")
    assert [finding.verdict for finding in found.findings] == ["trained"]


def test_weights_of_a_full_fine_tune_are_measured_or_said_to_be_unread(learnt: Any, tmp_path: Path) -> None:
    shutil.copytree(learnt.output / "base", tmp_path, dirs_exist_ok=True)
    log = [{"step": i, "loss": loss, "learning_rate": 1e-5} for i, loss in enumerate(FALLING, start=1)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    unread = explain_run(tmp_path)
    assert unread.verdict == "undecided"
    assert "the weights in" in unread.findings[0].evidence[0]
    measured = explain_run(tmp_path, data="demo")
    assert measured.evidence.loss > 5.0  # the base, which nobody trained
    assert measured.evidence.adapters is None
    assert measured.evidence.first_loss.base is None
    assert measured.verdict == "reload-differs"  # the log is of another run
    assert "the saved weights disagree" in measured.text
    assert len(measured.evidence.round_trips) == 4


@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoints/epoch=2-step=150.ckpt", "final/lit_model.pth.lora"])
def test_nothing_is_called_right_while_weights_were_not_looked_at(name: str, log_of: Callable[..., Path]) -> None:
    folder = log_of(FALLING)
    assert explain_run(folder).verdict == "trained"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"PK")
    found = explain_run(folder)
    assert found.verdict == "undecided"
    assert name in found.findings[0].evidence[0]


def test_precision_of_the_run_is_said_beside_numbers_that_are_not_finite(log_of: Callable[..., Path]) -> None:
    found = explain_run(log_of([2.0, 1.9, *[math.nan] * 8], fp16=True))
    assert found.verdict == "numerics"
    assert "by its options the run is in fp16" in found.findings[0].evidence


def test_latest_of_several_runs_in_a_folder_is_taken(log_of: Callable[..., Path], tmp_path: Path) -> None:
    """As ms-swift numbers them below its output_dir."""
    for number in (9, 10):
        shutil.copytree(log_of([2.0] * number), tmp_path / f"v{number}-20260101-120000")
    assert len(explain_run(tmp_path).evidence.curve) == 10


def test_killed_run_goes_on_where_its_last_state_ends(log_of: Callable[..., Path]) -> None:
    """LLaMA-Factory's log has no norms, but steps beyond the last checkpoint."""
    losses = [2.0 - 0.005 * i for i in range(60)]
    folder = log_of(losses[:40])
    lines = [{"current_steps": i, "total_steps": 100, "loss": x} for i, x in enumerate(losses, start=1)]
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"current_st')
    curve = explain_run(folder).evidence.curve
    assert [point.loss for point in curve] == losses
    assert [point.grad_norm for point in curve[38:42]] == [1.0, 1.0, None, None]


def test_steps_that_a_resumed_run_made_again_count_once(log_of: Callable[..., Path]) -> None:
    folder = log_of([])
    steps = [*range(1, 51), *range(41, 81)]
    rows = [{"loss": 2.0, "global_step/max_steps": f"{step}/80", "learning_rate": 1e-4} for step in steps]
    (folder / "logging.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evidence = explain_run(folder).evidence
    assert [point.step for point in evidence.curve] == list(range(1, 81))
    assert evidence.sources.resumed == (41,)


@pytest.mark.parametrize("name", ["logging.jsonl", "trainer_state.json", "metrics.csv", "args.json"])
def test_log_that_is_no_text_is_refused_with_its_name(
    name: str, log_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Options alone can be done without; they are listed as not looked at."""
    folder = log_of([2.0] * 10)
    (folder / name).write_bytes(b"\xff\xfe{")
    status = run(["explain", str(folder)])
    printed = capsys.readouterr()
    assert status == (0 if name == "args.json" else 2)
    assert name in (printed.out if name == "args.json" else printed.err)


def test_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "there is no run to explain" in error
    assert "neither a log nor an adapter" in error
