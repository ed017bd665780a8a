"""Reads the logs that trainers write, and brings their names and numbers into one form.

Read are our own trajectory, ``trainer_state.json`` (transformers, and all that build on it: TRL, axolotl, GLM-4's own
script), ``trainer_log.jsonl`` (LLaMA-Factory), ``logging.jsonl`` (ms-swift), ``metrics.csv`` (Lightning, LitGPT),
``log_<time>.txt`` (torchtune), and what transformers prints, as ``debug.log`` (axolotl), ``running_log.txt``
(LLaMA-Factory's web interface) or a redirected terminal keep it.

Source: the classes that write them. transformers 5.23 ``TrainerState`` and ``ProgressCallback.on_log``, llamafactory
0.9.5 ``LogCallback``, ms-swift 4.6 ``add_train_message`` and ``megatron.PrintCallback``, lightning 2.6 ``CSVLogger``,
torchtune 0.6 ``DiskLogger``.
"""

from __future__ import annotations

import ast
import csv
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from glm4ft.errors import DataError
from glm4ft.model.checkpoint import one_line
from glm4ft.reading import decode_json
from glm4ft.train.best import is_exhausted, log_of_adapter
from glm4ft.train.trajectory import FILE_NAME, read_trajectory

STATE_FILE = "trainer_state.json"
_STEP = ("step", "current_steps", "global_step/max_steps", "iteration", "global_step")
# of a step; Lightning writes a mean over the epoch beside it, which is taken only where there is nothing else
_LOSS = ("loss", "train_loss", "train_loss_step", "loss_step", "training_loss", "train_loss_epoch", "loss_epoch")
_EVAL_LOSS = ("eval_loss", "val_loss", "valid_loss", "validation_loss", "val_loss_epoch", "loss_val")
_NORM = ("grad_norm", "gradient_norm", "grad_norm_total", "grad_2.0_norm_total")
_RATE = ("lr", "learning_rate")
_WHOLE_RUN = ("train_runtime", "log_history")  # mark the last entry, whose loss is the mean of the run


@dataclass(frozen=True)
class RunLog:
    """The log of a run.

    Args:
        path: The file; the first one if it is continued by others.
        entries: One mapping per logged step or evaluation, in order: ``step`` from 1, and any of ``loss``,
            ``grad_norm``, ``lr``, ``epoch`` and ``eval_loss``. A number that was not finite is NaN or infinite.
        settings: What the log says of the run as a whole (``train_batch_size``, ``max_steps``, ``save_steps``).
        resumed: The steps at which the log goes back to an earlier step, hence the run was resumed.
    """

    path: Path
    entries: Sequence[Mapping[str, float]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    resumed: tuple[int, ...] = ()

    @property
    def last_step(self) -> int:
        """The last logged step; 0 for an empty log."""
        return int(self.entries[-1]["step"]) if self.entries else 0

    @property
    def num_figures(self) -> int:
        """The number of figures in the log: of two logs up to one step, the richer one is read."""
        return sum(map(len, self.entries))


def find_logs(folder: Path) -> list[RunLog]:
    """Read all logs in one folder; what it holds in subfolders is not looked at.

    Args:
        folder: The folder of a run or of a checkpoint.
    Returns:
        The logs with at least one entry.
    Raises:
        InputError: If a file that should be a log cannot be read.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    found = [(path, reader) for pattern, reader in _READERS.items() for path in paths if fnmatch(path.name, pattern)]
    logs = [reader(path) for path, reader in found]
    return [log for log in logs if log.entries]


def join_logs(logs: Sequence[RunLog]) -> RunLog | None:
    """Join the logs of one run: the one that reaches furthest, or before it a richer one that it continues.

    A killed run leaves, beside the state of its last checkpoint, a sparser log that goes on from there.

    Returns:
        The log; None if there is none.
    """
    if not logs:
        return None
    furthest = max(logs, key=lambda log: (log.last_step, log.num_figures))
    earlier = [log for log in logs if log.last_step < furthest.last_step]
    before = max(earlier, key=lambda log: log.num_figures, default=None)
    if before is None or not _continues(furthest, before):
        return furthest
    rest = [entry for entry in furthest.entries if entry["step"] > before.last_step]
    resumed = dict.fromkeys((*before.resumed, *furthest.resumed))
    return RunLog(before.path, (*before.entries, *rest), {**furthest.settings, **before.settings}, tuple(resumed))


def _continues(later: RunLog, before: RunLog) -> bool:
    """Whether two logs tell of the same run, and the one that ends earlier says more of it."""
    losses = {entry["step"]: entry["loss"] for entry in before.entries if "loss" in entry}
    common = [(losses[e["step"]], e["loss"]) for e in later.entries if "loss" in e and e["step"] in losses]
    figures = {name for entry in later.entries for name in entry}
    has_more = any(set(entry) - figures for entry in before.entries)
    # logs round to four digits
    return has_more and bool(common) and all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in common)


def ended_by_patience(output: Path) -> int | None:
    """The step after which a run's own patience ended it; None if something else did, or it goes on.

    Args:
        output: The folder of the run, with its trajectory.
    """
    trajectory = read_trajectory(output / FILE_NAME)
    patience, found = trajectory.header.get("config", {}).get("patience"), trajectory.evaluations
    is_last = bool(found and trajectory.steps) and found[-1]["step"] == trajectory.steps[-1]["step"]
    return int(found[-1]["step"]) if is_last and is_exhausted(found, patience) else None


def _of_trajectory(path: Path) -> RunLog:
    trajectory = read_trajectory(path)
    about = {"num_rows": int(trajectory.header.get("rows", 0)), "patience_ended": ended_by_patience(path.parent)}
    return _log(path, log_of_adapter(path.parent), about)


def _of_state(path: Path) -> RunLog:
    try:
        state = decode_json(_text(path), strict=False)  # where a run broke, transformers writes NaN into its state
    except ValueError as error:
        raise DataError("the file is not JSON", where=str(path), found=one_line(error)) from error
    history = (state.get("log_history") or []) if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise DataError(
            "not a state of transformers' Trainer", where=f"{path}: log_history", expected="a list of objects"
        )
    return _log(path, history, {name: value for name, value in state.items() if name != "log_history"})


def _of_json_lines(path: Path) -> RunLog:
    rows, settings = [], dict[str, Any]()
    lines = _text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = decode_json(line, strict=False)
        except ValueError as error:
            if number == len(lines):  # a killed run could not finish it
                continue
            raise DataError("not a line of JSON", where=f"{path}:{number}", found=one_line(error)) from error
        if isinstance(row, dict):
            rows.append(row)
            settings.update({"max_steps": total} if (total := _total_steps(row)) else {})
    return _log(path, rows, settings)


def _of_csv(path: Path) -> RunLog:
    """Lightning writes what it logs at one step in several rows: losses, rates, evaluations. It counts from 0."""
    steps: dict[str, dict[str, str]] = {}
    for number, row in enumerate(csv.DictReader(_text(path).splitlines())):
        known = {_plain(name): value for name, value in row.items() if name and value}
        steps.setdefault(known.get("step", str(number)), {}).update(known)
    shown = next((name for name in _LOSS if any(name in row for row in steps.values())), "")
    rows = [
        {name: value for name, value in row.items() if name == shown or name not in _LOSS} for row in steps.values()
    ]
    return _log(path, rows, first_step=0)


def _of_torchtune(path: Path) -> RunLog:
    rows = []
    for line in _text(path).splitlines():
        if match := re.match(r"Step (\d+) \| (.*)", line):
            rows.append({"step": match[1], **dict(re.findall(r"(\S+?):(\S+)", match[2]))})
    return _log(path, rows)


def _of_printed(path: Path) -> RunLog:
    """The dictionaries that transformers prints, which do not name their steps: they are numbered."""
    rows = list(_printed(_text(path)))
    kept = [row for row in rows if "loss" in row or any(name.startswith("eval_") for name in row)]
    numbers, count = [], 0
    for row in kept:
        count += "loss" in row
        numbers.append({"step": max(count, 1), **row})
    return _log(path, numbers, {"steps_are_numbered": True} if kept else {})


def _printed(text: str) -> Iterator[dict[str, Any]]:
    for match in re.finditer(r"\{'[^{}\n]*\}", text):
        try:
            # nan and inf are no literals of Python
            row = ast.literal_eval(re.sub(r"(?<=: )(nan|-?inf)\b", r"'\1'", match[0]))
        except (ValueError, SyntaxError):
            continue
        if isinstance(row, dict) and {"loss", "eval_loss", "train_runtime"} & set(row):
            yield row


_READERS: Mapping[str, Callable[[Path], RunLog]] = {
    FILE_NAME: _of_trajectory,
    STATE_FILE: _of_state,
    "trainer_log.jsonl": _of_json_lines,
    "logging.jsonl": _of_json_lines,
    "metrics.csv": _of_csv,
    "log_*.txt": _of_torchtune,
    "running_log.txt": _of_printed,
    "*.log": _of_printed,
    "nohup.out": _of_printed,
}


def _log(
    path: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None, first_step: int = 1
) -> RunLog:
    """Normalise the rows, and drop those that a resumed run made again."""
    entries: list[dict[str, float]] = []
    resumed, last = list[int](), 0.0
    for number, row in enumerate(rows, start=1):
        entry = _entry(row, number, 1 - first_step)
        if entry is None:
            continue
        if "loss" in entry:
            if entry["step"] < last:
                resumed.append(int(entry["step"]))
                entries = [e for e in entries if e["step"] < entry["step"]]
            last = entry["step"]
        entries.append(entry)
    return RunLog(path, entries, settings or {}, tuple(resumed))


def _entry(row: Mapping[str, Any], number: int, offset: int) -> dict[str, float] | None:
    """One row under our names; None if it tells of no step."""
    if any(name in row for name in _WHOLE_RUN):
        return None
    is_finite = row.get("finite") is not False  # our own rows write null beside this mark
    plain = {_plain(name): value for name, value in row.items()} | dict(row)
    found = {
        "loss": _figure(plain, _LOSS, is_finite),
        "eval_loss": _figure(plain, _EVAL_LOSS, is_finite),
        "grad_norm": _figure(plain, _NORM, is_finite),
        "lr": _figure(plain, (*_RATE, *(name for name in plain if name.startswith("lr_"))), is_finite),
        "epoch": _figure(plain, ("epoch",), True),
    }
    if found["eval_loss"] is None:  # transformers names the losses of several evaluation sets after them
        several = [n for n in plain if re.fullmatch(r"eval_.+_loss", n)]
        found["eval_loss"] = _figure(plain, several, is_finite)
    if found["loss"] is None and found["eval_loss"] is None:
        return None
    step = next((str(plain[name]).partition("/")[0] for name in _STEP if plain.get(name) is not None), str(number))
    if not math.isfinite(_number(step)):
        return None
    return {"step": _number(step) + offset, **{name: value for name, value in found.items() if value is not None}}


def _plain(name: str) -> str:
    """A name without the separators that loggers of metrics put into it, as in ``train/loss`` or ``lr-AdamW``."""
    return re.sub(r"[/ -]", "_", name).lower()


def _figure(row: Mapping[str, Any], names: Sequence[str], is_finite: bool) -> float | None:
    """The first of some names that has a value; NaN for null in a row that says it is not finite."""
    for name in names:
        if name in row and row[name] is not None:
            return _number(row[name])
        if name in row and not is_finite:
            return math.nan
    return None


def _number(value: Any) -> float:
    """A number, which some trainers write as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _total_steps(row: Mapping[str, Any]) -> int | None:
    of = next((str(row[name]).partition("/")[2] for name in _STEP if "/" in str(row.get(name))), row.get("total_steps"))
    return int(of) if of and str(of).isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace" if path.suffix in (".log", ".out", ".txt") else "strict")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("cannot read the log", where=str(path), found=one_line(error)) from error
