"""Several processes compute what one computes, and end together; the run goes on with another number of them.

Two launches, each of which runs several commands, since a process takes seconds to start. One process with twice the
accumulation takes the same rows in each step.

Run: pytest tests/train/test_several_processes.py     (GLM4FT_PROCESSES=4 before it: with four)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from glm4ft.errors import ConfigError, RunError
from glm4ft.train.config import TrainConfig
from glm4ft.train.processes import explaining_lost_processes, require_same_sharding
from glm4ft.train.run import run_training
from glm4ft.train.run_folder import last_checkpoint
from glm4ft.train.trainer import SupervisedTrainer
from glm4ft.train.trajectory import Trajectory, read_trajectory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(FullyShardedDataParallelPlugin, "fsdp_version"),
        reason="needs an accelerate that knows FSDP2, and restores optimizers on CPUs; found " + version("accelerate"),
    ),
]
PROCESSES = int(os.environ.get("GLM4FT_PROCESSES", "2"))
DRIVER = Path(__file__).with_name("in_processes.py")
CONFIG = TrainConfig(max_steps=20, eval_every=7, save_every=5, micro_batch_size=2)
# Measured with torch 2.13 on two gloo processes, padded: at most 1.4e-6 of any figure, 3.1e-7 of any adapter matrix,
# where the sums of fp32 are taken in another order.
FIGURES, WEIGHTS = 1e-5, 1e-5
FSDP2 = {
    "distributed_type": "FSDP",
    "num_processes": PROCESSES,
    "use_cpu": True,
    "mixed_precision": "no",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    },
}


def talks(path: Path, num_talks: int) -> str:
    """Conversations of different lengths and shares of supervised tokens."""
    records = [
        [("user", f"question {i} " + "why " * (7 * i % 11)), ("assistant", f"answer {i} " + "so " * (5 * i % 13))]
        for i in range(num_talks)
    ]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in record]}) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


class Launches:
    """The runs of one process, and what the launchers made of the same commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Nine rows in micro-batches of two: in the last step of an epoch one process has half a micro-batch, and the
        # other no row and so no target. Five rows in evaluations of two.
        data, held_out = talks(folder / "talks.jsonl", 9), talks(folder / "held_out.jsonl", 5)
        self.padded = replace(CONFIG, data=data, eval_data=held_out)
        self.packed = replace(self.padded, packing=True, max_length=96, micro_batch_size=1)
        self.one = {
            name: self.run(replace(config, accumulation=PROCESSES), name)
            for name, config in {"padded": self.padded, "packed": self.packed}.items()
        }

    def run(self, config: TrainConfig, name: str, **kwargs: Any) -> Path:
        """Train in this process."""
        return run_training(replace(config, output=str(self.folder / name)), say=lambda _: None, **kwargs).output

    def stopped(self, name: str, step: int) -> Path:
        """A copy of the run of one process as it was after a checkpoint."""
        output = shutil.copytree(self.one["padded"], self.folder / name)
        for path in [output / "complete", *output.glob("adapter*")]:
            path.unlink()
        shutil.rmtree(output / "checkpoint-20")
        assert last_checkpoint(output) == output / f"checkpoint-{step}"
        return output

    def job(self, config: TrainConfig, name: str, **fault: Any) -> dict[str, Any]:
        """The command that trains into a folder of that name."""
        options = {**vars(config), "output": str(self.folder / name), "lora": {}}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in options.items() if v not in (None, {}, [])}))
        return {"argv": ["train", f"--config={path}"], **fault}

    def launch(self, *launcher: str, jobs: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
        """Run commands in the processes of a launcher."""
        path = self.folder / f"jobs-{launcher[0]}.json"
        path.write_text(json.dumps(jobs))
        command = [sys.executable, "-m", *launcher, str(DRIVER), str(path)]
        return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def ddp(launches: Launches) -> subprocess.CompletedProcess[str]:
    jobs = [
        launches.job(launches.padded, "ddp-padded"),
        launches.job(launches.packed, "ddp-packed"),
        {"argv": ["train", "--resume", str(launches.stopped("one-to-two", 15))]},
        launches.job(launches.padded, "ddp-killed", fault="killed", at=7),
    ]
    return launches.launch("torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", jobs=jobs)


@pytest.fixture(scope="module")
def fsdp2(launches: Launches) -> subprocess.CompletedProcess[str]:
    path = launches.folder / "fsdp2.yaml"
    path.write_text(yaml.safe_dump(FSDP2))
    jobs = [
        launches.job(launches.padded, "fsdp2-padded", fault="stopped", at=9, status=143),
        {"argv": ["train", "--resume", str(launches.folder / "fsdp2-padded")]},
        launches.job(launches.packed, "fsdp2-terminated", fault="launcher terminated", at=3),
    ]
    return launches.launch("accelerate.commands.launch", f"--config_file={path}", jobs=jobs)


def require_equal(output: Path, one: Path) -> None:
    """Two runs are the same to rounding, and each step and evaluation was written once."""
    ran, expected = (read_trajectory(folder / "trajectory.jsonl") for folder in (output, one))
    assert [row["step"] for row in ran.steps] == list(range(1, 21))
    for exact in ("lr", "supervised_tokens", "tokens", "clipped"):
        assert column(ran, exact) == column(expected, exact)
    assert column(ran, "loss") == pytest.approx(column(expected, "loss"), rel=FIGURES)
    assert column(ran, "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=FIGURES)
    assert [row["step"] for row in ran.evaluations] == [row["step"] for row in expected.evaluations] == [7, 14, 20]
    losses = [[row["eval_loss"] for row in trajectory.evaluations] for trajectory in (ran, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=FIGURES)
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (output, one))
    assert weights.keys() == others.keys()
    assert max(float((weights[n] - others[n]).norm() / others[n].norm()) for n in others) < WEIGHTS


def column(trajectory: Trajectory, name: str) -> list[Any]:
    return [row[name] for row in trajectory.steps]


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_two_processes_with_ddp_are_one(kind: str, launches: Launches, ddp: subprocess.CompletedProcess[str]) -> None:
    """Rows that no number of processes divides are trained once in each epoch, and a process may have none."""
    require_equal(launches.folder / f"ddp-{kind}", launches.one[kind])


def test_shards_of_fsdp2_are_one_and_resume(launches: Launches, fsdp2: subprocess.CompletedProcess[str]) -> None:
    """Stopped by a signal to one process; the adapter is whole in each checkpoint, though the state is in shards."""
    output = launches.folder / "fsdp2-padded"
    require_equal(output, launches.one["padded"])
    assert (output / "checkpoint-20" / "pytorch_model_fsdp_0").is_dir()
    assert (
        load_file(output / "checkpoint-20" / "adapter_model.safetensors").keys()
        == load_file(output / "adapter_model.safetensors").keys()
    )


def test_only_the_main_process_talks_and_writes(launches: Launches, ddp: subprocess.CompletedProcess[str]) -> None:
    assert ddp.stdout.count("adapter, trajectory and config: ") == 3
    assert ddp.stdout.count("9 conversations, 9 rows") == 4
    names = {path.name for path in (launches.folder / "ddp-padded").iterdir()}
    assert {"checkpoint-15", "checkpoint-20", "complete"} <= names
    assert not names & {"checkpoint-5", "checkpoint-10"}


def test_run_of_one_process_goes_on_with_two(launches: Launches, ddp: subprocess.CompletedProcess[str]) -> None:
    require_equal(launches.folder / "one-to-two", launches.one["padded"])


def test_killed_process_ends_all_and_one_goes_on(launches: Launches, ddp: subprocess.CompletedProcess[str]) -> None:
    """Within seconds, with a message and a status; the rest of the run is that of one process."""
    output = launches.folder / "ddp-killed"
    assert ddp.returncode != 0
    assert "SIGKILL" in ddp.stderr
    assert f"--resume {output}" in ddp.stderr
    assert last_checkpoint(output) == output / "checkpoint-5"
    resumed = launches.run(launches.padded, "ddp-killed", resume=True)
    require_equal(resumed, launches.one["padded"])


def test_terminated_launcher_leaves_a_checkpoint_and_the_command(
    launches: Launches, fsdp2: subprocess.CompletedProcess[str]
) -> None:
    output = launches.folder / "fsdp2-terminated"
    assert fsdp2.returncode != 0
    checkpoint = last_checkpoint(output)
    assert checkpoint is not None
    assert f"to go on after the last checkpoint: glm4ft train --resume {output}" in fsdp2.stderr


@pytest.mark.parametrize("name", ["WORLD_SIZE", "sharding"])
def test_run_that_cannot_go_on_as_it_was_is_refused(
    name: str, launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = launches.stopped(f"refused-{name}", 15)
    if name == "WORLD_SIZE":
        monkeypatch.setenv("WORLD_SIZE", "3")
        expected = f"3 processes, {PROCESSES} micro-batches"
    else:
        (output / "checkpoint-15" / "pytorch_model_fsdp_0").mkdir()
        expected = "expected: training with FSDP"
    with pytest.raises(ConfigError, match=expected):
        launches.run(replace(launches.padded, accumulation=PROCESSES), output.name, resume=True)
    with pytest.raises(ConfigError, match=r"found: +training with DeepSpeed"):
        require_same_sharding(tmp_path, "DeepSpeed")


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_error_of_a_lost_process_names_the_checkpoint(error: RuntimeError, is_told: bool, launches: Launches) -> None:
    with pytest.raises((RuntimeError, RunError)) as caught, explaining_lost_processes(launches.one["padded"]):
        raise error
    assert isinstance(caught.value, RunError) == is_told
    assert not is_told or "checkpoint-20" in str(caught.value)


def test_weights_of_other_shards_must_be_finite(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process sees its own part of a parameter; what it saves is gathered from all."""
    save: Callable[..., None] = SupervisedTrainer._save

    def broken(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        name, p = next((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        save(self, output_dir, {name: torch.full_like(p, torch.nan)})

    monkeypatch.setattr(SupervisedTrainer, "_save", broken)
    with pytest.raises(RunError, match="1 of 24 trained parameters are not finite"):
        launches.run(replace(launches.padded, max_steps=1), "broken-shard")
    assert not (launches.folder / "broken-shard" / "complete").exists()
