"""Finds what is left of a run on the disk, whichever trainer left it: logs, weights, options."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm4ft.data.encoded_rows import ROWS_FILE
from glm4ft.diagnosis.trainer_logs import STATE_FILE, RunLog, find_logs, join_logs
from glm4ft.errors import ConfigError
from glm4ft.model.adapter import PICKLE, WEIGHTS
from glm4ft.model.checkpoint import INDEX, SINGLE_FILE, one_line
from glm4ft.reading import decode_json, decode_yaml
from glm4ft.train.run_folder import CONFIG_FILE
from glm4ft.train.trajectory import FILE_NAME

ADAPTER_CONFIG = "adapter_config.json"
# Where trainers put a run below the folder that they were given: ms-swift's versions, and those of Lightning's loggers.
_RUNS = ("v[0-9]*-*", "lightning_logs/version_*", "version_*", "logs/csv/version_*")
# Files with the options of a run, and the names of those options that a diagnosis uses, by ours.
_OPTION_FILES = (
    "args.json",  # ms-swift
    "training_args.yaml",  # LLaMA-Factory's web interface
    "hparams.yaml",  # Lightning
    "hyperparameters.yaml",  # LitGPT
    CONFIG_FILE,
)
_OPTION_NAMES = {
    "learning_rate": "learning_rate",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "gradient_accumulation_steps": "accumulation",
    "accumulate_grad_batches": "accumulation",
    "global_world_size": "world_size",
    "world_size": "world_size",
    "per_device_train_batch_size": "micro_batch_size",
    "micro_batch_size": "micro_batch_size",
    "train_batch_size": "micro_batch_size",
    "max_steps": "planned_steps",
    "save_steps": "save_steps",
    "patience_ended": "patience_ended",
}
# Weights in formats that are not opened: pickles, and those of trainers' own.
_CLOSED_WEIGHTS = (
    "pytorch_model*.bin",
    "checkpoint-*/pytorch_model*.bin",
    "*.ckpt",
    "checkpoints/*.ckpt",
    "*/lit_model.pth*",
    "global_step*/*model_states.pt",
    "epoch_*/*.safetensors",
)
_UNREAD = {
    "**/events.out.tfevents.*": "curves of TensorBoard, for which there is no reader",
    "training_args.bin": "options in a pickle, which can run code",
}


@dataclass(frozen=True)
class RunFiles:
    """What is left of a run on the disk.

    Args:
        folder: The folder of the run; one below the folder that was named, if only that holds a run.
        log: The log; None if there is none.
        adapter: The folder with the adapter; None if none was saved.
        weights: The folder with weights of the whole model; None if there are none, or there is an adapter.
        config: The options of one of our runs; empty for another trainer's.
        options: What is known of the options of any run, by our names.
        rows: The file of the rows as trained; None if there is none.
        checkpoints: The steps of which there is a checkpoint.
        closed: Files of weights in formats that are not opened.
        unread: What else may tell of the run and is not looked at, with the reason.
    """

    folder: Path
    log: RunLog | None
    adapter: Path | None
    weights: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: Path | None = None
    checkpoints: tuple[int, ...] = ()
    closed: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def rows_per_step(self) -> int | None:
        """The number of rows in one optimizer step, at least; None if it is not known."""
        size = self.options.get("micro_batch_size")
        parts = [int(self.options.get(name) or 1) for name in ("accumulation", "world_size")]
        return int(size) * parts[0] * parts[1] if size else None


def find_files(named: Path) -> RunFiles:
    """Look through the folder of a run.

    Args:
        named: The folder that the user named.
    Returns:
        What it holds.
    Raises:
        ConfigError: If it holds neither a log nor an adapter nor weights.
    """
    for run in _run_folders(named):
        checkpoints = sorted(
            (path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)),
            key=lambda path: int(path.name[11:]),
            reverse=True,
        )
        folders = [run, *checkpoints]
        # the log of the last checkpoint holds those of the checkpoints before
        state = next((folder for folder in checkpoints if (folder / STATE_FILE).is_file()), None)
        if (run / FILE_NAME).is_file():  # one of ours, whose adapter may be an earlier one than its last checkpoint's
            state = None
        log = join_logs([*find_logs(run), *(find_logs(state) if state else [])])
        adapter = next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)
        weights = next((folder for folder in folders if _holds_weights(folder)), None)
        if log is None and adapter is None and weights is None:
            continue
        config = _config(run)
        rows = run / ROWS_FILE
        return RunFiles(
            folder=run,
            log=log,
            adapter=adapter,
            weights=weights if adapter is None else None,
            config=config,
            options={**config, **_options(folders[:2], log)},
            rows=rows if rows.is_file() else None,
            checkpoints=tuple(int(path.name[11:]) for path in reversed(checkpoints)),
            closed=tuple(_closed(run)),
            unread=tuple(_unread(named, run, adapter)),
        )
    seen = sorted(path.name for path in named.iterdir())[:8] if named.is_dir() else []
    raise ConfigError(
        "there is no run to explain",
        where=str(named),
        found=("neither a log nor an adapter" + f"; it has {', '.join(seen)}" * bool(seen))
        if named.is_dir()
        else "no such folder",
        expected=f"{FILE_NAME}, {STATE_FILE}, trainer_log.jsonl, logging.jsonl or metrics.csv, and {ADAPTER_CONFIG}",
    )


def has_weights(adapter: Path) -> bool:
    """Whether the weights of an adapter are there, be it in a pickle that will be refused."""
    return any((adapter / name).is_file() for name in (WEIGHTS, PICKLE))


def _holds_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (SINGLE_FILE, INDEX))


def _run_folders(named: Path) -> Iterator[Path]:
    """The folder itself, then those below it that may be runs, the latest first."""
    yield named
    for pattern in _RUNS:
        yield from sorted(named.glob(pattern), key=_version, reverse=True)


def _version(folder: Path) -> tuple[int, str]:
    number = re.search(r"\d+", folder.name)
    return int(number[0]) if number else 0, folder.name


def _config(run: Path) -> dict[str, Any]:
    """The options of one of our runs."""
    if not (run / FILE_NAME).is_file():
        return {}
    try:
        return _mapping(run / CONFIG_FILE)
    except (OSError, ValueError) as error:
        where = str(run / CONFIG_FILE)
        raise ConfigError("cannot read the configuration", where=where, found=one_line(error)) from error


def _options(folders: Sequence[Path], log: RunLog | None) -> dict[str, Any]:
    """The options of any run that a diagnosis uses, by our names; of numbers those above zero."""
    given = [log.settings] if log else []
    for path in _option_files(folders):
        with contextlib.suppress(OSError, ValueError):  # such a file is listed as unread
            given.append(_mapping(path))
    found = dict[str, Any]()
    for options in given:
        precision = next((name for name in ("fp16", "bf16") if options.get(name) is True), None)
        found |= {"precision": precision} if precision else {}
        for name, ours in _OPTION_NAMES.items():
            number = _positive(options.get(name))
            if number is not None:
                found.setdefault(ours, number)
    return found


def _option_files(folders: Sequence[Path]) -> list[Path]:
    return [path for folder in folders for name in _OPTION_FILES if (path := folder / name).is_file()]


def _positive(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number > 0 and not isinstance(value, bool) else None


def _mapping(path: Path) -> dict[str, Any]:
    """The top of a JSON or YAML file; empty if there is none."""
    if not path.is_file():
        return {}
    text = path.read_text("utf-8")
    content = decode_json(text, strict=False) if path.suffix == ".json" else decode_yaml(text)
    return content if isinstance(content, dict) else {}


def _closed(run: Path) -> Iterator[str]:
    for pattern in _CLOSED_WEIGHTS:
        for path in sorted(run.glob(pattern))[-1:]:
            yield str(path.relative_to(run))


def _unread(named: Path, run: Path, adapter: Path | None) -> Iterator[str]:
    for path in _option_files([run]):
        try:
            _mapping(path)
        except (OSError, ValueError) as error:
            yield f"{path.relative_to(named)}: {one_line(error)}"
    for pattern, why in _UNREAD.items():
        files = sorted({*run.glob(pattern), *named.glob(pattern)})
        if files:
            yield f"{files[0].relative_to(named)}: {why}"
    if adapter is not None and not has_weights(adapter):
        yield f"the adapter: {adapter.relative_to(named) / ADAPTER_CONFIG} is there, {WEIGHTS} is not"
