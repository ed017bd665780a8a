"""The folder of a run: how it is begun, which of its checkpoints is complete, and how it is brought back to one."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from glm4ft.errors import ConfigError, RunError
from glm4ft.files import write_atomically
from glm4ft.train.config import TrainConfig
from glm4ft.train.trajectory import FILE_NAME, append_row, read_trajectory, rewind

CONFIG_FILE = "config.yaml"
BASE_FOLDER = "base"  # where a run on the built-in base writes that base, so that others can load the adapter
COMPLETE_MARKER = "complete"  # written into a run or a checkpoint when everything else is there


def is_run(output: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (output / CONFIG_FILE).is_file()


def is_complete(output: Path) -> bool:
    """Whether a folder holds a run that was trained to its end."""
    return (output / COMPLETE_MARKER).exists()


def new_output() -> str:
    """A folder below ``runs`` that does not exist yet, named by the time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = [f"runs/{stamp}", *(f"runs/{stamp}-{i}" for i in range(2, 100))]
    return next(name for name in names if not Path(name).exists())


def begin(output: Path, config: TrainConfig, header: dict[str, Any], write_rest: Callable[[], None]) -> None:
    """Write what a run has before its first step; leave nothing behind if that fails.

    Args:
        output: The folder of the run: empty, or not there yet.
        config: The options, written as ``config.yaml``.
        header: The first row of the trajectory.
        write_rest: A function that writes everything else into the folder.
    Raises:
        ConfigError: If something cannot be written.
    """
    existed = output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_rest()
        write_atomically(output / CONFIG_FILE, yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
        append_row(output / FILE_NAME, header)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(output, ignore_errors=True)
        if existed:
            output.mkdir()
        raise ConfigError("the run cannot be written", where=str(output), found=str(error)) from error


def require_same_rows(output: Path, header: dict[str, Any]) -> None:
    """Refuse to resume a run on other data.

    Args:
        output: The folder of the run.
        header: The header that the trajectory of a new run on the data would have.
    Raises:
        ConfigError: If the rows are not those of the run.
    """
    before = read_trajectory(output / FILE_NAME).header
    if before["rows_sha256"] != header["rows_sha256"]:
        raise ConfigError(
            "the data are not those of the run to resume",
            where=str(output),
            found=header["rows_sha256"],
            expected=before["rows_sha256"],
            fix="restore the data file, or start a new run with another --output",
        )


def rewind_run(output: Path) -> None:
    """Bring an unfinished run back to its last complete checkpoint, or to its beginning."""
    checkpoint = last_checkpoint(output)
    step = checkpoint_step(checkpoint) if checkpoint else 0
    for other in checkpoints(output):
        if checkpoint_step(other) > step:
            shutil.rmtree(other)
    rewind(output / FILE_NAME, step)


def last_checkpoint(output: Path) -> Path | None:
    """The latest checkpoint of a run that was written to its end, or None."""
    complete = [folder for folder in checkpoints(output) if (folder / COMPLETE_MARKER).exists()]
    return max(complete, key=checkpoint_step, default=None)


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, unfinished ones too; a folder such as ``checkpoint-best`` is the user's own."""
    return [folder for folder in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def is_last(checkpoint: Path, config: TrainConfig) -> bool:
    """Whether a run has nothing to train after a checkpoint; transformers would take one step more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    steps = read_trajectory(checkpoint.parent / FILE_NAME).steps
    has_target = config.target is not None and bool(steps) and steps[-1]["loss"] < config.target
    return bool(state["global_step"] >= state["max_steps"]) or has_target


@contextlib.contextmanager
def explaining_failed_writes(output: Path) -> Iterator[None]:
    """Turn a write that fails in mid-run into a RunError that names the last good checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError of its archive writer
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        left = last_checkpoint(output)
        raise RunError(
            f"the run cannot be written: {error}; last good checkpoint: {left or 'none'}; when there is room, continue "
            f"with --resume {shlex.quote(str(output))}"
        ) from error


def require_disk_space(output: Path, adapter_bytes: int, keep_checkpoints: int) -> None:
    """Fail before the first step rather than at the first checkpoint.

    Args:
        output: The folder of the run; it need not exist.
        adapter_bytes: The size of the trained parameters.
        keep_checkpoints: The number of checkpoints on disk at once; 0 if none is written.
    Raises:
        ConfigError: If the disk has not enough free space.
    """
    # a checkpoint holds the adapter and AdamW's two moments; one more than is kept exists while one is written
    needed = adapter_bytes * (1 + 3 * (keep_checkpoints + bool(keep_checkpoints))) + 2**24
    existing = next(parent for parent in [output.resolve(), *output.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if not free >= needed:
        raise ConfigError(
            "not enough room on the disk for the run",
            where=str(output),
            found=f"{free / 2**20:,.0f} MiB free",
            expected=f"{needed / 2**20:,.0f} MiB",
            fix="free some space, choose another --output, or lower --keep_checkpoints",
        )
