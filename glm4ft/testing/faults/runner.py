"""Runs faults and benign variations against the suite, one warm process per core."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from re import DOTALL, search

from glm4ft.errors import ConfigError
from glm4ft.testing.faults.benign import all_variations
from glm4ft.testing.faults.reach import reaching
from glm4ft.testing.faults.registry import Fault, all_faults
from glm4ft.testing.faults.results import Caught, Silence
from glm4ft.testing.faults.warm import in_parallel, warm_base
from glm4ft.testing.replay.tolerances import Observation, observing
from glm4ft.testing.trial.runner import Result, run_check
from glm4ft.testing.trial.stages import STAGES
from glm4ft.testing.trial.trial import Trial


def run_faults(ids: Sequence[str], num_workers: int | None = None) -> Iterator[Caught | Silence]:
    """Try faults and variations in parallel.

    Args:
        ids: of both kinds.
        num_workers: processes; by default one per core.
    Yields:
        Results as they come.
    Raises:
        ConfigError: if an id is unknown.
    """
    require_known_ids(ids)
    yield from in_parallel(run_one, ids, num_workers)


def require_known_ids(ids: Sequence[str]) -> None:
    """Refuse an id that is neither a fault's nor a variation's.

    Raises:
        ConfigError: naming them.
    """
    unknown = [id for id in ids if id not in all_faults() and id not in all_variations()]
    if unknown:
        raise ConfigError("no such fault", found=", ".join(unknown), expected="an id of docs/kill-matrix.md")


def run_one(id: str) -> Caught | Silence:
    """Try a fault up to its first verdict, or a variation to the end, in this process."""
    with tempfile.TemporaryDirectory(prefix="glm4ft-fault-") as folder, contextlib.redirect_stdout(io.StringIO()):
        return try_fault(id, Path(folder)) if id in all_faults() else try_variation(id, Path(folder))


def try_fault(id: str, folder: Path, stages: Sequence[str] = STAGES) -> Caught:
    """Run the checks that can see a fault, up to its stage and in order, until one fails.

    Args:
        id: of the fault.
        folder: for whatever is written.
        stages: that are judged.
    """
    fault, began_s, errors, failed = all_faults()[id], time.perf_counter(), list[str](), None
    trial = Trial(fault.subject(str(warm_base())), warm_base(), folder)
    with observing() as seen:
        for check in reaching(fault.subject, fault.stage):
            if check.stage not in stages:
                continue
            result = run_check(check, trial)
            if result.status == "error":
                errors.append(f"{check.name}: {result.message}")
            if result.status == "failed":
                failed = result
                break
    return _caught(fault, failed, seen, time.perf_counter() - began_s, tuple(errors))


def _caught(
    fault: Fault, result: Result | None, seen: Sequence[Observation], seconds: float, errors: tuple[str, ...]
) -> Caught:
    if result is None:
        return Caught(fault.id, fault.stage, (), "", "", False, seconds, errors)
    text = f"{result.check.replace('_', ' ')}: {result.message}"
    names_cause = search(fault.cause, result.message, DOTALL) is not None
    over = tuple(o for o in seen if not o.size <= o.limit)
    return Caught(fault.id, fault.stage, (result.check,), result.stage, text, names_cause, seconds, errors, over)


def try_variation(id: str, folder: Path) -> Silence:
    """Run the checks that can see a variation."""
    subject, began_s = all_variations()[id].subject, time.perf_counter()
    trial = Trial(subject(str(warm_base())), warm_base(), folder)
    results = [run_check(check, trial) for check in reaching(subject)]
    alarms = tuple(f"{r.check}: {r.message}" for r in results if r.status in ("failed", "error"))
    return Silence(id, alarms, time.perf_counter() - began_s)
