"""The file of a baseline: JSON Lines, a header with its identity and origin, then one line for each step and seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from glm4ft.errors import DataError, show
from glm4ft.files import write_atomically
from glm4ft.testing.baseline.curves import Curve, StepFigures
from glm4ft.testing.baseline.identity import Identity

SCHEMA = 1
ANEW = "record it anew: glm4ft baseline record --output FILE"


@dataclass(frozen=True)
class Baseline:
    """Recorded curves with their identity and origin.

    Args:
        subject: The subject as ``MODULE:ATTR``; "" for runs that ``glm4ft record`` recorded.
        model: The base, as for ``--glm4ft-model``.
        identity: What was trained, and how.
        environment: Where the curves were measured.
        commit: The commit that was measured; "" outside of a repository.
        recorded_at: The time of the recording, in ISO 8601, UTC.
        curves: One curve for each seed.
    """

    subject: str
    model: str
    identity: Identity
    environment: Mapping[str, str]
    commit: str
    recorded_at: str
    curves: tuple[Curve, ...]

    @property
    def source(self) -> str:
        """What was measured, in words."""
        return f"{self.subject or 'recorded runs'} on {self.model}"


@dataclass(frozen=True)
class _Header:
    """The first line of the file."""

    schema: int
    type: str
    subject: str
    model: str
    commit: str
    recorded_at: str
    environment: dict[str, str]
    identity: Identity
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class _Line(StepFigures):
    """One step of one seed; its speed and memory stand beside it for the history."""

    seed: int = 0
    step_s: float = 0.0
    peak_memory_bytes: int = 0


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline, whole or not at all.

    Args:
        path: The file to write or replace.
        baseline: The baseline; its figures are finite.
    """
    told = {name: getattr(baseline, name) for name in ("subject", "model", "commit", "recorded_at")}
    seeds = [curve.seed for curve in baseline.curves]
    header = {"schema": SCHEMA, "type": "header", **told, "environment": dict(baseline.environment),
              "identity": asdict(baseline.identity), "seeds": seeds}  # fmt: skip
    more = [{"seed": c.seed, **asdict(s), "step_s": c.step_s, "peak_memory_bytes": c.peak_memory_bytes}
            for c in baseline.curves for s in c.steps]  # fmt: skip
    lines = [json.dumps(line, ensure_ascii=False, allow_nan=False) for line in (header, *more)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(lines) + "\n")


def read_baseline(path: Path) -> Baseline:
    """Read a baseline.

    Raises:
        DataError: If the file cannot be read, or a line is not what it should be; the message names the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise DataError("cannot read the baseline", where=str(path), found=found, fix=ANEW) from error
    if not lines:
        raise DataError("the baseline is empty", where=str(path), fix=ANEW)
    header = _parsed(path, 1, lines[0], TypeAdapter(_Header))
    if header.schema != SCHEMA:
        raise DataError("another version's baseline", where=f"{path}, line 1: schema", found=str(header.schema),
                        expected=str(SCHEMA), fix=ANEW)  # fmt: skip
    steps = [_parsed(path, number, line, TypeAdapter(_Line)) for number, line in enumerate(lines[1:], start=2)]
    curves = tuple(_curves(path, header.seeds, steps))
    return Baseline(header.subject, header.model, header.identity, header.environment, header.commit,
                    header.recorded_at, curves)  # fmt: skip


def _parsed(path: Path, number: int, line: str, kind: TypeAdapter[Any]) -> Any:
    try:
        # not validate_json: pydantic 2.0 reads a number off by its last bit
        return kind.validate_python(json.loads(line))
    except (ValidationError, json.JSONDecodeError) as error:
        first: Any = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": f"JSON: {error}"}
        field = ".".join(str(part) for part in first["loc"])
        where = f"{path}, line {number}" + (f": {field}" if field else "")
        fix = "record it anew: glm4ft baseline record"
        raise DataError(
            "not a line of a baseline", where=where, found=show(line), expected=first["msg"], fix=fix
        ) from None


def _curves(path: Path, seeds: tuple[int, ...], lines: list[_Line]) -> Iterator[Curve]:
    names = StepFigures.__dataclass_fields__
    num_steps = max((line.step for line in lines), default=0)
    for seed in seeds:
        mine = [line for line in lines if line.seed == seed]
        if [line.step for line in mine] != list(range(1, num_steps + 1)) or not mine:
            raise DataError("the baseline is not whole", where=str(path), found=f"{len(mine)} steps of seed {seed}",
                            expected=f"{num_steps}, numbered from 1", fix=ANEW)  # fmt: skip
        steps = tuple(StepFigures(**{name: getattr(line, name) for name in names}) for line in mine)
        yield Curve(seed, steps, mine[0].step_s, mine[0].peak_memory_bytes)
