"""Several processes: which of them talks and writes, and which may continue a run that others began."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from torch.distributed import DistError
from transformers import Trainer

from glm4ft.errors import ConfigError, RunError
from glm4ft.train.config import TrainConfig
from glm4ft.train.run_folder import last_checkpoint
from glm4ft.train.trajectory import FILE_NAME, read_trajectory

# what only sharded training writes into a checkpoint, and alone can read
_SHARDED = {"FSDP": "pytorch_model_fsdp*", "DeepSpeed": "global_step*"}


def is_main_process() -> bool:
    """Whether this process writes files and talks to people: the first of several under torchrun, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """The number of processes that torchrun started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding(trainer: Trainer) -> str:
    """What splits the model over the processes, so that none holds it whole: ``FSDP``, ``DeepSpeed``, or "".

    Args:
        trainer: The trainer.
    """
    return "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else ""


def shared_accumulation(output: Path, config: TrainConfig, processes: int) -> int:
    """The forward passes per step on each process with which a step holds the rows that it held when the run began.

    Args:
        output: The folder of the run.
        config: The options of the run.
        processes: The number of processes that continue it.
    Raises:
        ConfigError: If the micro-batches of a step cannot be shared among so many processes.
    """
    began: int = read_trajectory(output / FILE_NAME).header.get("processes", 1)
    micro_batches = config.accumulation * began
    if micro_batches % processes:
        raise ConfigError(
            "the run cannot be continued by this number of processes, which cannot share the micro-batches of a step",
            where=str(output),
            found=f"{processes} processes, {micro_batches} micro-batches",
            expected=f"a number that divides {micro_batches}; it began with {began}",
        )
    return micro_batches // processes


def require_same_sharding(checkpoint: Path, now: str) -> None:
    """Refuse a checkpoint of sharded training where nothing is sharded, or the other way round.

    Args:
        checkpoint: The checkpoint to resume from.
        now: What shards the model: ``FSDP``, ``DeepSpeed`` or nothing, "".
    Raises:
        ConfigError: If the checkpoint was written with another.
    """
    before = next((name for name, pattern in _SHARDED.items() if any(checkpoint.glob(pattern))), "")
    if before != now:
        raise ConfigError(
            "the checkpoint holds the state of another kind of training",
            where=str(checkpoint),
            found=f"training with {now}" if now else "training without FSDP and DeepSpeed",
            expected=f"training with {before}" if before else "training without FSDP and DeepSpeed",
            fix="launch the run as it was launched before",
        )


@contextlib.contextmanager
def explaining_lost_processes(output: Path) -> Iterator[None]:
    """Turn what torch says of a process that has vanished into a RunError that names the last good checkpoint."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):  # gloo's errors have no type of their own
            raise
        raise RunError(
            f"another process of the run is gone, or cannot be reached: {error}; last good checkpoint: "
            f"{last_checkpoint(output) or 'none'}; continue with --resume {shlex.quote(str(output))}"
        ) from error
