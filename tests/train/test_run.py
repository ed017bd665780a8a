"""A run repeats bit for bit, survives SIGKILL, does not depend on how its rows are batched, and stops when it must.

Run: pytest tests/train/test_run.py
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm4ft.data.batching import Collator
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.dataset import prepare_rows
from glm4ft.data.inputs import DEMO_DATA
from glm4ft.data.reader import read_conversations
from glm4ft.errors import ConfigError, RunError
from glm4ft.model.base_model import load_base
from glm4ft.model.generation import greedy
from glm4ft.model.loss import install_supervised_loss
from glm4ft.report.observed_run import ObservedRun, train_observed
from glm4ft.train.config import TrainConfig
from glm4ft.train.run import chat_format_of
from glm4ft.train.run_folder import COMPLETE_MARKER, last_checkpoint
from glm4ft.train.trainer import ProgressBar, peak_memory_bytes

SHORT = TrainConfig(data=str(Path(__file__).with_name("two_short_talks.jsonl")), max_steps=8, save_every=0)
SIXTY = replace(SHORT, max_steps=60, learning_rate=2e-3)


def train(config: TrainConfig, output: Path, **kwargs: Any) -> ObservedRun:
    return train_observed(replace(config, output=str(output)), say=lambda _: None, **kwargs)


def figures(result: ObservedRun) -> list[tuple[float, ...]]:
    """What a trajectory says of the computation, without clocks and memory."""
    names = ("step", "loss", "grad_norm", "lr", "supervised_tokens", "tokens")
    return [tuple(row[name] for name in names) for row in result.trajectory.steps]


def many_talks(path: Path, num_talks: int = 10) -> Path:
    """Conversations of different lengths, so that every way of batching them has something to get wrong."""
    records = [
        {
            "messages": [
                {"role": "user", "content": f"question {i} " + "why " * (7 * i % 11)},
                {"role": "assistant", "content": f"answer {i} " + "so " * (5 * i % 13)},
            ]
        }
        for i in range(num_talks)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    config = replace(SHORT, data=str(many_talks(tmp_path / "talks.jsonl")), lora=replace(SHORT.lora, dropout=0.1))
    runs = [train(config, tmp_path / name) for name in ("a", "b")]
    assert figures(runs[0]) == figures(runs[1])
    weights = [load_file(run.output / "adapter_model.safetensors") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert figures(train(replace(config, seed=1), tmp_path / "c")) != figures(runs[0])


@pytest.mark.slow
def test_run_killed_at_a_random_step_resumes_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL leaves whatever it finds, half a checkpoint included; the rest of the run is that of an unbroken one."""
    config = replace(
        SHORT,
        data=str(many_talks(tmp_path / "talks.jsonl")),
        max_steps=28,  # five epochs of five steps and a part of one; enough left after the kill for a slow machine
        save_every=2,
        lora=replace(SHORT.lora, dropout=0.1),
    )
    unbroken = train(config, tmp_path / "unbroken")
    kill_after = random.randint(1, 18)
    killed = tmp_path / "killed"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": config.data, "max_steps": 28, "save_every": 2}))
    command = [sys.executable, "-m", "glm4ft", "train", f"--config={tmp_path / 'config.yaml'}", "--lora.dropout=0.1"]
    process = subprocess.Popen([*command, f"--output={killed}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    trajectory = killed / "trajectory.jsonl"
    while process.poll() is None and not (trajectory.exists() and trajectory.read_text().count("\n") > kill_after):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, f"finished before step {kill_after}"
    resumed = train(config, killed, resume=True)
    assert figures(resumed) == figures(unbroken), f"killed after step {kill_after}"
    weights = [load_file(run.output / "adapter_model.safetensors") for run in (unbroken, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> ObservedRun:
    """An unbroken run of two epochs and a part of one, five steps each."""
    folder = tmp_path_factory.mktemp("twelve")
    config = replace(SHORT, data=str(many_talks(folder / "talks.jsonl")), max_steps=12, save_every=1)
    return train(config, folder / "run")


@pytest.mark.parametrize("step", [4, 5, 6])
def test_resume_at_and_around_an_epochs_end(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch, twelve: ObservedRun
) -> None:
    """Five steps are an epoch; the rows of the rest come in the order of an unbroken run (accelerate 4071, 1466)."""
    config = replace(SHORT, data=str(many_talks(tmp_path / "talks.jsonl")), max_steps=12, save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr("glm4ft.train.trainer.SupervisedTrainer._record_step", fail_after(step))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "broken")
    checkpoint = last_checkpoint(tmp_path / "broken")
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{step}"
    assert figures(train(config, tmp_path / "broken", resume=True)) == figures(twelve)


def fail_after(step: int) -> Any:
    from glm4ft.train.trainer import SupervisedTrainer

    record = SupervisedTrainer._record_step

    def record_step(self: SupervisedTrainer, at: int, *args: Any) -> None:
        if at > step:
            raise KeyboardInterrupt
        record(self, at, *args)

    return record_step


def test_unfinished_checkpoint_is_passed_over(tmp_path: Path) -> None:
    config = replace(SHORT, max_steps=6, save_every=2)
    whole = train(config, tmp_path / "run")
    (tmp_path / "run" / COMPLETE_MARKER).unlink()
    (tmp_path / "run" / "checkpoint-6" / COMPLETE_MARKER).unlink()
    # a copy that the user made is no checkpoint of the run, and is left alone
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-best")
    resumed = train(config, tmp_path / "run", resume=True)
    assert figures(resumed) == figures(whole)
    assert (tmp_path / "run" / "checkpoint-6" / COMPLETE_MARKER).exists()
    assert (tmp_path / "run" / "checkpoint-best" / COMPLETE_MARKER).exists()


@pytest.mark.parametrize("target_loss", [None, 8.5])
def test_run_killed_after_its_last_step_trains_no_step_more(tmp_path: Path, target_loss: float | None) -> None:
    """In mid-epoch transformers would take one; what is left to do is to write the adapter."""
    data = str(many_talks(tmp_path / "talks.jsonl"))
    config = replace(SHORT, data=data, max_steps=7, save_every=1, learning_rate=5e-3, target_loss=target_loss)
    whole = train(config, tmp_path / "run")
    assert len(whole.trajectory.steps) == 7 if target_loss is None else 1 < len(whole.trajectory.steps) < 7
    adapter = (whole.output / "adapter_model.safetensors").read_bytes()
    for name in (COMPLETE_MARKER, "adapter_model.safetensors"):
        (whole.output / name).unlink()
    resumed = train(config, whole.output, resume=True)
    assert figures(resumed) == figures(whole)
    assert (whole.output / "adapter_model.safetensors").read_bytes() == adapter


def test_complete_run_is_left_as_it_is(tmp_path: Path) -> None:
    whole = train(replace(SHORT, max_steps=3, save_every=2), tmp_path / "run")
    before = {path: path.read_bytes() for path in whole.output.rglob("*") if path.is_file()}
    resumed = train(replace(SHORT, max_steps=3, save_every=2), tmp_path / "run", resume=True)
    assert figures(resumed) == figures(whole)
    assert {path: path.read_bytes() for path in whole.output.rglob("*") if path.is_file()} == before


def test_complete_run_is_asked_again_for_the_round_trip_that_was_asked_for(tmp_path: Path) -> None:
    """Or a run whose answers did not come back, or that was interrupted before they were tried, would pass."""
    config = replace(SHORT, max_steps=2, round_trip=True)
    whole = train(config, tmp_path / "run")
    adapter = (whole.output / "adapter_model.safetensors").read_bytes()
    (whole.output / "report.html").unlink()
    resumed = train(config, whole.output, resume=True)
    assert not whole.is_reproduced
    assert resumed.round_trips == whole.round_trips
    assert figures(resumed) == figures(whole)
    assert (whole.output / "adapter_model.safetensors").read_bytes() == adapter
    assert (whole.output / "report.html").exists()


def test_round_trip_asks_for_what_was_trained(tmp_path: Path) -> None:
    """Turns that were cut to fit, and conversations that were dropped, need not come back."""
    long = [{"role": r, "content": f"{r} {i}"} for i in range(9) for r in ("user", "assistant")]
    dropped = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (long, dropped)))
    result = train(replace(SHORT, data=str(path), max_length=60, max_steps=1, round_trip=True), tmp_path / "run")
    assert {turn.line for turn in result.round_trips} == {1}
    assert 0 < len(result.round_trips) < 9
    assert result.round_trips[-1].expected == "\nassistant 8<|user|>"


def test_each_conversation_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, round trip and report share the rows; every encoding more costs minutes on a large file."""
    monkeypatch.setenv("GLM4FT_CACHE", str(tmp_path / "cache"))
    encoded: list[int] = []
    encode = ChatFormat.encode
    monkeypatch.setattr(ChatFormat, "encode", lambda self, talk: encoded.append(talk.line) or encode(self, talk))
    result = train(replace(SHORT, max_steps=1, round_trip=True), tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()
    assert {turn.line for turn in result.round_trips} == set(encoded)
    assert sorted(encoded) == [1, 2]


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    data = many_talks(tmp_path / "talks.jsonl")
    config = replace(SHORT, data=str(data), max_steps=2, save_every=1)
    train(config, tmp_path / "run")
    (tmp_path / "run" / COMPLETE_MARKER).unlink()
    many_talks(data, num_talks=9)
    with pytest.raises(ConfigError, match="the data are not those of the run to resume"):
        train(config, tmp_path / "run", resume=True)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> ObservedRun:
    """Sixty steps of padded batches, well past the target."""
    result = train(SIXTY, tmp_path_factory.mktemp("padded") / "run")
    assert result.trajectory.steps[-1]["loss"] < 0.01
    return result


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 1, "accumulation": 2},
        {"gradient_checkpointing": True},
        {"packing": True, "max_length": 300},
    ],
    ids=lambda change: "-".join(change),
)
def test_way_of_computing_does_not_change_the_result(
    tmp_path: Path, change: dict[str, Any], padded: ObservedRun
) -> None:
    """Accumulated, checkpointed and packed runs are the padded one, at 1e-6 relative in loss for 5 steps.

    Measured on an x86-64 CPU with torch 2.13: at most 1.5e-7 to step 5 and 3.9e-6 to step 60, where the loss is 0.0026;
    on the bundled demo 7e-8 and 2.1e-6. Checkpointing is exact.
    """
    expected = [row["loss"] for row in padded.trajectory.steps]
    got = [row["loss"] for row in train(replace(SIXTY, **change), tmp_path / "changed").trajectory.steps]
    for step, (a, b) in enumerate(zip(expected, got, strict=True), start=1):
        assert abs(a - b) <= (1e-6 if step <= 5 else 1e-4) * a, f"step {step}: {a} and {b}"


def test_trajectory_keeps_the_contract(learnt: ObservedRun) -> None:
    lines = (learnt.output / "trajectory.jsonl").read_text().splitlines()
    header, *steps = [json.loads(line) for line in lines]
    assert header["type"] == "header"
    assert all(row["schema"] == 1 for row in [header, *steps])
    wanted = {"type", "step", "loss", "grad_norm", "lr", "supervised_tokens", "tokens", "step_s"}
    assert all(wanted <= row.keys() for row in steps)
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    assert all(row["clipped"] == (row["grad_norm"] > 1.0) for row in steps)
    assert {row["clipped"] for row in steps} == {True, False}
    assert {row["supervised_tokens"] for row in steps} == {115}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [0.0, 0.5, *((1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))]),
    ],
)
def test_rate_follows_its_schedule(tmp_path: Path, schedule: Any, expected: list[float]) -> None:
    """Two steps of warm-up, then the named shape over the remaining six."""
    result = train(replace(SHORT, schedule=schedule, warmup_steps=2, learning_rate=1e-3), tmp_path / "run")
    assert [row["lr"] for row in result.trajectory.steps] == pytest.approx([1e-3 * x for x in expected], abs=1e-12)


def test_plain_peft_loads_the_adapter_and_says_the_same(learnt: ObservedRun) -> None:
    """No code of ours: what adapter_config.json names is enough."""
    config = json.loads((learnt.output / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    model = PeftModel.from_pretrained(base, learnt.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(learnt.output)
    chat_format = ChatFormat("glm-4-0414", tokenizer)
    turns = iter(learnt.round_trips)
    for conversation in read_conversations(DEMO_DATA):
        row = chat_format.encode(conversation)
        for turn in row.turns:
            generated = greedy(model, row.input_ids[: turn.start], chat_format.stop_ids, 99)
            assert tokenizer.decode(generated) == next(turns).generated


def test_no_pickle_is_written(tmp_path: Path) -> None:
    """Weights are safetensors; optimizer, schedule and generator states keep transformers' own .pt and .pth files."""
    result = train(replace(SHORT, max_steps=2, save_every=2), tmp_path / "run")
    suffixes = {path.suffix for path in result.output.rglob("*") if path.is_file()}
    assert ".bin" not in suffixes
    states = [path for path in result.output.rglob("*") if path.suffix in (".pt", ".pth")]
    assert {path.name for path in states} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_evaluation_is_the_mean_over_all_held_out_tokens(tmp_path: Path) -> None:
    """Not the mean of batch means: seven rows of unlike length in batches of two give the same as one by one."""
    data = str(many_talks(tmp_path / "talks.jsonl", num_talks=7))
    losses = []
    for micro_batch_size in (1, 2):
        config = replace(
            SHORT,
            eval_data=data,
            eval_every=1,
            max_steps=1,
            micro_batch_size=micro_batch_size,
            accumulation=2 // micro_batch_size,
            learning_rate=1e-12,  # the evaluation comes after a step, which must not matter here
        )
        result = train(config, tmp_path / str(micro_batch_size))
        losses.append(result.trajectory.evaluations[0]["eval_loss"])
    alone = train(replace(SHORT, data=data, max_steps=1, micro_batch_size=7), tmp_path / "alone")
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # the same rows as one training batch: the token mean that the trainer itself computes
    assert losses[0] == pytest.approx(alone.trajectory.steps[0]["loss"], rel=1e-6)


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    """With dropout on, an evaluation that used up random numbers or left eval mode on would show."""
    config = replace(SHORT, lora=replace(SHORT.lora, dropout=0.3))
    plain = train(config, tmp_path / "plain")
    evaluated = train(replace(config, eval_data=SHORT.data, eval_every=2, save_every=3), tmp_path / "evaluated")
    assert figures(plain) == figures(evaluated)
    assert [row["step"] for row in evaluated.trajectory.evaluations] == [2, 4, 6, 8]
    assert evaluated.trajectory.evaluations[-1]["eval_loss"] == pytest.approx(loss_without_dropout(evaluated), rel=1e-6)


@pytest.mark.parametrize("target_loss", [None, 8.8])
def test_last_step_is_evaluated_whatever_ended_the_run(tmp_path: Path, target_loss: float | None) -> None:
    config = replace(SHORT, eval_data=SHORT.data, eval_every=100, max_steps=4, target_loss=target_loss)
    trajectory = train(config, tmp_path / "run").trajectory
    assert [row["step"] for row in trajectory.evaluations] == [trajectory.steps[-1]["step"]]


def loss_without_dropout(result: ObservedRun) -> float:
    """Of the saved adapter on the run's rows."""
    rows, _ = prepare_rows(str(SHORT.data), chat_format_of(SHORT), max_length=SHORT.max_length)
    batch = Collator(0)([rows[i] for i in range(len(rows))])
    del batch["lines"]
    base = load_base("tiny").model
    install_supervised_loss(base)
    return float(PeftModel.from_pretrained(base, result.output).eval()(**batch).loss)


def test_non_finite_gradient_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step, its rows and the last good checkpoint are named, and the broken step is in the trajectory as null."""
    from glm4ft.train.trainer import SupervisedTrainer

    training_step, models = SupervisedTrainer.training_step, []

    def poisoned(self: SupervisedTrainer, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        models.append(model)
        loss = training_step(self, model, *args, **kwargs)
        if self.state.global_step == 4:
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(SupervisedTrainer, "training_step", poisoned)
    with pytest.raises(RunError, match=r"at step 5; rows from line\(s\) 1, 2; last good checkpoint: .*checkpoint-4"):
        train(replace(SHORT, save_every=2), tmp_path / "run")
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())
    last = json.loads((tmp_path / "run" / "trajectory.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 5
    assert last["grad_norm"] is None
    assert last["finite"] is False


def test_weights_that_the_last_update_broke_are_not_saved(tmp_path: Path) -> None:
    """The loss of the last step is finite, since it is that before the update: no figure would show it."""
    with pytest.raises(RunError, match=r"24 of 24 trained parameters are not finite after step 1, .*none"):
        train(replace(SHORT, learning_rate=1e38, max_steps=1, save_every=1), tmp_path / "run")
    assert not list((tmp_path / "run").glob("**/adapter_model.safetensors"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_of_a_resumed_run_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar, state = ProgressBar(), SimpleNamespace(max_steps=10, global_step=4, is_world_process_zero=True)
    bar.on_train_begin(None, state, None)
    assert " 4/10 " in sys.stderr.getvalue()
    state.global_step = 5
    bar.on_log(None, state, None, logs={"loss": 1.25, "grad_norm": 0.5})
    bar.on_train_end(None, state, None)
    assert re.search(r" 5/10 .*step/s, loss=1\.25, grad=0\.5", sys.stderr.getvalue())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of the process")
def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = Path("/proc/self/status").read_text()
    (high_water_kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert peak_memory_bytes() == pytest.approx(int(high_water_kib) * 1024, rel=0.01)  # the kernel counts in lots


def test_step_without_targets_is_refused_with_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would log 0.0 for it (TRL 6668). Rows without targets never get here, so they are forced in."""
    monkeypatch.setattr("glm4ft.data.encoding.any", lambda _: True, raising=False)
    path = many_talks(tmp_path / "talks.jsonl", num_talks=25)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["messages"][1]["loss"] = False
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(RunError, match=r"step 1 has no supervised token.*line\(s\) 1, 2, .*, 20 and 5 more;"):
        train(replace(SHORT, data=str(path), micro_batch_size=25), tmp_path / "run")


def test_unused_folder_is_required(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already in use"):
        train(SHORT, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_full_disk_is_seen_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(ConfigError, match="not enough room on the disk"):
        train(SHORT, tmp_path / "run")
    assert not (tmp_path / "run").exists()
