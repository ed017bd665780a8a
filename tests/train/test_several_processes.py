"""Several processes compute what one computes, and end together; the run goes on with another number of them.

Two launches, each of which runs several commands, since a process takes seconds to start.

Run: pytest tests/train/test_several_processes.py     (GLM4FT_PROCESSES=4 before it: with four)
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from launches import PROCESSES, Launches, require_equal
from safetensors.torch import load_file

from glm4ft.errors import ConfigError, RunError
from glm4ft.train.processes import explaining_lost_processes, require_same_sharding
from glm4ft.train.run_folder import last_checkpoint
from glm4ft.train.trainer import SupervisedTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(FullyShardedDataParallelPlugin, "fsdp_version"),
        reason="needs an accelerate that knows FSDP2, and restores optimizers on CPUs; found " + version("accelerate"),
    ),
]
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
