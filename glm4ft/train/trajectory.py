"""The trajectory of a run: ``trajectory.jsonl``, a header and then one strict-JSON row per optimizer step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from glm4ft.errors import DataError, show
from glm4ft.files import finite_or_null, write_atomically
from glm4ft.reading import json_lines, validated

FILE_NAME = "trajectory.jsonl"
SCHEMA = 1
_KIND = "a trajectory row"


@dataclass(frozen=True)
class Trajectory:
    """A trajectory as read from disk.

    Args:
        header: The identity of the run: options, data digest, versions, device, number of processes.
        steps: Rows with ``step`` from 1 upwards, ``loss`` in nats per supervised token before the update,
            ``grad_norm`` (global L2 norm before clipping), ``clipped``, ``lr`` of the update, ``supervised_tokens``,
            ``tokens``, ``step_s`` and ``peak_memory_bytes``. A number that was not finite is None.
        evaluations: Rows with ``step`` and ``eval_loss``.
    """

    header: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...] = ()


Number = Annotated[float, Field(allow_inf_nan=False)] | None
Count = Annotated[int, Field(ge=0)] | None


class HeaderRow(BaseModel, extra="allow"):
    """The first row. Another version may write fewer fields, or, as in every row, others; none of these is null."""

    type: Literal["header"]
    rows: Annotated[int, Field(ge=0)] = 0
    rows_sha256: str = ""
    processes: Annotated[int, Field(ge=1)] = 1
    config: dict[str, Any] = {}
    libraries: dict[str, Any] = {}


class StepRow(BaseModel, extra="allow"):
    """The row of an optimizer step; a number that was not finite is null."""

    type: Literal["step"]
    step: Annotated[int, Field(ge=1)]
    loss: Number
    grad_norm: Number = None
    lr: Number = None
    clipped: bool | None = None
    supervised_tokens: Count = None
    tokens: Count = None
    step_s: Number = None
    peak_memory_bytes: Count = None


class EvalRow(BaseModel, extra="allow"):
    """The row of an evaluation, after that of its step."""

    type: Literal["eval"]
    step: Annotated[int, Field(ge=0)]
    eval_loss: Number


class OtherRow(BaseModel, extra="allow"):
    """A row of a type that another version writes."""

    type: str
    step: Count = None


ROWS: dict[str, type[BaseModel]] = {"step": StepRow, "eval": EvalRow}


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
    return json.dumps({"schema": SCHEMA} | finite_or_null(row), allow_nan=False)  # ASCII: names may be no UTF-8


def read_trajectory(path: Path) -> Trajectory:
    """Read a trajectory; an unfinished last line, left by a killed run, is passed over.

    Raises:
        DataError: If the file is missing, has no header, holds a row with a value of a wrong type, or lacks a step.
    """
    rows = _read_rows(path)
    by_type = {kind: tuple(row for row in rows if row.get("type") == kind) for kind in ROWS}
    return Trajectory(rows[0], by_type["step"], by_type["eval"])


def rewind(path: Path, step: int) -> None:
    """Drop all rows after a step, so that a resumed run appends where its checkpoint stands.

    Args:
        path: The trajectory file; replaced atomically.
        step: The last step to keep; 0 keeps the header alone.
    """
    kept = [row for row in _read_rows(path) if (row.get("step") or 0) <= step]
    write_atomically(path, "".join(dump_row(row) + "\n" for row in kept))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows, each with values of the right types; steps count from 1 without a gap."""
    rows: list[dict[str, Any]] = []
    fix = "restore the file from a copy, or start a new run"
    step = 0
    lines = json_lines(path, DataError, "cannot read the trajectory", kind=_KIND, skip_unfinished=True, fix=fix)
    for where, row in lines:
        if not rows and row.get("type") != "header":
            raise _no_header(where, show(row))
        model = ROWS.get(str(row.get("type")), OtherRow) if rows else HeaderRow
        validated(model, row, where=where, error=DataError, kind=_KIND, fix=fix)
        if row.get("type") == "step":
            if row["step"] != step + 1:
                found, expected = f"step {row['step']}", f"step {step + 1}"
                raise DataError("the trajectory has a gap", where=where, found=found, expected=expected, fix=fix)
            step += 1
        rows.append(row)
    if not rows:
        raise _no_header(f"{path}, line 1", "")
    return rows


def _no_header(where: str, found: str) -> DataError:
    return DataError("the trajectory has no header", where=where, found=found, expected='{"type": "header", ...}')
