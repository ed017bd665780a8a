"""The trajectory of a run: ``trajectory.jsonl``, a header and then one strict-JSON row per optimizer step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4ft.errors import DataError, show
from glm4ft.files import finite_or_null, write_atomically

FILE_NAME = "trajectory.jsonl"
SCHEMA = 1


@dataclass(frozen=True)
class Trajectory:
    """A trajectory as read from disk.

    Args:
        header: The identity of the run: data digest, versions, device.
        steps: Rows with ``step`` from 1 upwards, ``loss`` in nats per supervised token before the update,
            ``grad_norm`` (global L2 norm before clipping), ``clipped``, ``lr`` of the update, ``supervised_tokens``,
            ``tokens``, ``step_s`` and ``peak_memory_bytes``. A number that was not finite is None.
        evaluations: Rows with ``step`` and ``eval_loss``.
    """

    header: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...] = ()


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Write one row at the end of the file, whole, before returning.

    Args:
        path: The trajectory file; created if it is missing.
        row: The row; floats that are not finite become null beside ``"finite": false``.
    """
    with open(path, "a", encoding="utf-8") as file:
        file.write(dump_row(row) + "\n")


def dump_row(row: dict[str, Any]) -> str:
    """A row as one line of strict JSON, which knows neither NaN nor Infinity."""
    return json.dumps({"schema": SCHEMA} | finite_or_null(row), ensure_ascii=False, allow_nan=False)


def read_trajectory(path: Path) -> Trajectory:
    """Read a trajectory; an unfinished last line, left by a killed run, is passed over.

    Raises:
        DataError: If the file is missing, has no header, or holds a line that is no row.
    """
    rows = _read_rows(path)
    if not rows or rows[0].get("type") != "header":
        raise DataError("the trajectory has no header", where=f"{path}, line 1", expected='{"type": "header", ...}')
    by_type = {kind: tuple(row for row in rows if row.get("type") == kind) for kind in ("step", "eval")}
    return Trajectory(rows[0], by_type["step"], by_type["eval"])


def rewind(path: Path, step: int) -> None:
    """Drop all rows after a step, so that a resumed run appends where its checkpoint stands.

    Args:
        path: The trajectory file; replaced atomically.
        step: The last step to keep; 0 keeps the header alone.
    """
    kept = [row for row in _read_rows(path) if row.get("step", 0) <= step]
    write_atomically(path, "".join(dump_row(row) + "\n" for row in kept))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise DataError("cannot read the trajectory", where=str(path), found=found) from error
    return list(_parse(path, lines))


def _parse(path: Path, lines: list[str]) -> Iterable[dict[str, Any]]:
    # what follows the last newline is empty, or a line that a killed run could not finish
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a row is an object")
            yield row
        except ValueError as error:
            raise DataError("not a trajectory row", where=f"{path}, line {number}", found=show(line)) from error
