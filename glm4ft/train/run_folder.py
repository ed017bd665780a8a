"""The folder of a run: how it is begun, which of its checkpoints are intact, and how it is brought back to one."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from safetensors import SafetensorError

from glm4ft.errors import ConfigError, ModelError, RunError, show
from glm4ft.files import write_atomically
from glm4ft.folders import COMPLETE_MARKER, appearing_whole, damage, seal
from glm4ft.reading import validated
from glm4ft.train.config import TrainConfig
from glm4ft.train.trajectory import FILE_NAME, append_row, read_trajectory, rewind

CONFIG_FILE = "config.yaml"
BASE_FOLDER = "base"  # where a run on the built-in base writes that base, so that others can load the adapter
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MAY_MOVE = ("data", "output")  # options that may be edited: the data are recognised by their digest


def is_run(output: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (output / CONFIG_FILE).is_file()


def is_complete(output: Path) -> bool:
    """Whether a folder holds a run that was trained to its end."""
    return (output / COMPLETE_MARKER).exists()


def require_intact(output: Path) -> None:
    """Refuse a finished run whose adapter is not what was written.

    Raises:
        ModelError: If a file of the adapter is damaged.
    """
    if problem := damage(output):
        again = last_checkpoint(output)
        raise ModelError(
            "the adapter of the finished run is damaged",
            where=str(output),
            found=problem,
            fix=f"restore it from a copy; or remove {output / COMPLETE_MARKER}, and --resume trains again from "
            f"{again or 'the beginning'}",
        )


def complete(output: Path) -> None:
    """Mark a run as trained to its end, with the digests of its adapter."""
    seal(output, [output / name for name in ADAPTER_FILES])


def new_output() -> str:
    """A folder below ``runs`` that does not exist yet, named by the time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = [f"runs/{stamp}", *(f"runs/{stamp}-{i}" for i in range(2, 100))]
    return next(name for name in names if not Path(name).exists())


def begin(output: Path, config: TrainConfig, header: dict[str, Any], write_rest: Callable[[Path], None]) -> None:
    """Write what a run has before its first step; it appears whole or not at all, also if this process is killed.

    Args:
        output: The folder of the run, without content.
        config: The options, written as ``config.yaml``.
        header: The first row of the trajectory.
        write_rest: A function that writes everything else into the folder that it is given.
    Raises:
        ConfigError: If something cannot be written.
    """
    try:
        with appearing_whole(output, CONFIG_FILE) as folder:
            write_rest(folder)
            write_atomically(folder / CONFIG_FILE, yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
            append_row(folder / FILE_NAME, header | {"config": _plain(config)})
    except (OSError, SafetensorError) as error:
        raise ConfigError("the run cannot be written", where=str(output), found=str(error)) from error


def require_same_run(output: Path, config: TrainConfig, header: dict[str, Any]) -> None:
    """Refuse to resume a run with other options, or on other data.

    Args:
        output: The folder of the run.
        config: The options that ``config.yaml`` holds now.
        header: The header that the trajectory of a new run on the data would have.
    Raises:
        ConfigError: If options were edited, or the rows are not those of the run.
    """
    before = read_trajectory(output / FILE_NAME).header
    was, now = _by_name(before.get("config") or {}), _by_name(_plain(config))
    edited = [name for name in was if name not in _MAY_MOVE and was[name] != now.get(name)]
    if edited:
        raise ConfigError(
            "the options were edited after the run began",
            where=str(output / CONFIG_FILE),
            found="; ".join(f"{name}: {show(now.get(name))}, was {show(was[name])}" for name in edited),
            fix="restore the values that were, or start a new run with another --output",
        )
    if before.get("rows_sha256") != header["rows_sha256"]:
        raise ConfigError(
            "the data are not those of the run to resume",
            where=str(output),
            found=header["rows_sha256"],
            expected=str(before.get("rows_sha256")),
            fix="restore the data file, or start a new run with another --output",
        )


def rewind_run(output: Path, say: Callable[[str], object]) -> None:
    """Bring an unfinished run back to its last intact checkpoint, or to its beginning.

    Args:
        output: The folder of the run.
        say: A function that is given a line for each damaged checkpoint that is passed over.
    """
    checkpoint = last_checkpoint(output)
    step = checkpoint_step(checkpoint) if checkpoint else 0
    for other in checkpoints(output):
        if checkpoint_step(other) <= step:
            continue
        if is_complete(other):
            aside = _free_name(output / f"damaged-{other.name}")
            say(
                f"warning: {other.name} is damaged: {_problem(other)}; going on from "
                f"{checkpoint.name if checkpoint else 'the beginning'}; it is kept as {aside.name}"
            )
            os.replace(other, aside)
        else:
            shutil.rmtree(other)  # a killed run could not finish it
    rewind(output / FILE_NAME, step)


def complete_checkpoint(output: Path, step: int) -> None:
    """Mark a checkpoint as complete, with the digests of its files.

    Args:
        output: The folder of the run.
        step: The step after which the checkpoint was written.
    """
    seal(output / f"checkpoint-{step}", grown=output / FILE_NAME)


def drop_old_checkpoints(output: Path, keep: int) -> None:
    """Remove all but the latest complete checkpoints.

    Args:
        output: The folder of the run.
        keep: The number of checkpoints that stay.
    """
    for folder in sorted(filter(is_complete, checkpoints(output)), key=checkpoint_step)[:-keep]:
        shutil.rmtree(folder)


def last_checkpoint(output: Path) -> Path | None:
    """The latest checkpoint of a run that still is what was written, or None."""
    latest_first = sorted(checkpoints(output), key=checkpoint_step, reverse=True)
    return next((folder for folder in latest_first if not _problem(folder)), None)


def _problem(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or with the rows of the trajectory before it; "" if nothing is."""
    return damage(checkpoint, grown=checkpoint.parent / FILE_NAME)


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The options as strict JSON can represent them."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str), parse_constant=str)
    return plain


def _by_name(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their names on the command line: ``lora.rank``."""
    plain = {name: value for name, value in options.items() if not isinstance(value, dict)}
    groups = {name: value for name, value in options.items() if isinstance(value, dict)}
    return plain | {f"{group}.{name}": value for group in groups for name, value in groups[group].items()}


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, unfinished ones too; a folder such as ``checkpoint-best`` is the user's own."""
    return [folder for folder in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def is_last(checkpoint: Path, config: TrainConfig) -> bool:
    """Whether a run has nothing to train after a checkpoint; transformers would take one step more."""
    path = checkpoint / "trainer_state.json"
    from glm4ft.model.checkpoint import read_json  # and with it the hub's client, which no usage error should wait for

    state = validated(TrainerState, read_json(path), where=str(path), error=ModelError, kind="the state of a trainer")
    steps = read_trajectory(checkpoint.parent / FILE_NAME).steps
    last_loss = steps[-1]["loss"] if steps else None
    has_target = config.target is not None and last_loss is not None and last_loss < config.target
    return state.global_step >= state.max_steps or has_target


class TrainerState(BaseModel):
    """What is read of the ``trainer_state.json`` that transformers writes."""

    global_step: int
    max_steps: int


@contextlib.contextmanager
def explaining_failed_writes(output: Path) -> Iterator[None]:
    """Turn a write that fails in mid-run into a RunError that names the last good checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError of its archive writer, or of the check at its end
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container", str(error)):
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
