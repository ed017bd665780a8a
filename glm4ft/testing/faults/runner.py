"""Runs faults and benign variations against the suite, in one prepared process per core."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from re import DOTALL, search

from glm4ft.errors import ConfigError
from glm4ft.testing.faults.reach import reaching
from glm4ft.testing.faults.registry import Fault, all_faults
from glm4ft.testing.faults.results import Caught, Silence
from glm4ft.testing.faults.variations import all_variations
from glm4ft.testing.faults.warm import in_parallel, warm_base
from glm4ft.testing.replay.tolerances import Observation, observing
from glm4ft.testing.trial.runner import Result, run_check
from glm4ft.testing.trial.stages import STAGES
from glm4ft.testing.trial.trial import Trial


def run_faults(ids: Sequence[str], num_workers: int | None = None) -> Iterator[Caught | Silence]:
    """Run faults and variations in parallel.

    Args:
        ids: The ids of faults and variations.
        num_workers: The number of processes; by default one per core.
    Yields:
        The results, in the order in which they are completed.
    Raises:
        ConfigError: If an id is unknown.
    """
    require_known_ids(ids)
    yield from in_parallel(run_one, ids, num_workers)


def require_known_ids(ids: Sequence[str]) -> None:
    """Require that every id belongs to a fault or a variation.

    Raises:
        ConfigError: If some do not; the message names them.
    """
    unknown = [id for id in ids if id not in all_faults() and id not in all_variations()]
    if unknown:
        raise ConfigError("no such fault", found=", ".join(unknown), expected="an id of docs/kill-matrix.md")


def run_one(id: str) -> Caught | Silence:
    """Run the checks on a fault until one fails, or all checks on a variation, in this process."""
    with tempfile.TemporaryDirectory(prefix="glm4ft-fault-") as folder, contextlib.redirect_stdout(io.StringIO()):
        return try_fault(id, Path(folder)) if id in all_faults() else try_variation(id, Path(folder))


def try_fault(id: str, folder: Path, stages: Sequence[str] = STAGES) -> Caught:
    """Run the checks that can see a fault, in order, until one fails.

    A fault that no check of its own stage or an earlier one catches may be caught at a later stage, which is reported
    as such. A pipeline that raises an error counts as ``glm4ft check`` counts it, where no check fails otherwise.

    Args:
        id: The id of the fault.
        folder: The folder for all files that are written.
        stages: The stages whose checks are run.
    """
    fault, began_s, broken, failed = all_faults()[id], time.perf_counter(), list[Result](), None
    base = warm_base(architecture=fault.subject.architecture)
    trial = Trial(fault.subject(str(base)), base, folder)
    with observing() as seen:
        for check in reaching(fault.subject):
            if check.stage not in stages:
                continue
            if broken and STAGES.index(check.stage) > STAGES.index(fault.stage):
                break
            result = run_check(check, trial)
            if result.status == "error":
                broken.append(result)
            if result.status == "failed":
                failed = result
                break
    errors = tuple(f"{result.check}: {result.message}" for result in broken)
    found = failed or (broken[0] if broken else None)
    return _caught(fault, found, seen, time.perf_counter() - began_s, errors)


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
    """Run all checks that can see a variation.

    Args:
        id: The id of the variation.
        folder: The folder for all files that are written.
    """
    subject, began_s = all_variations()[id].subject, time.perf_counter()
    trial = Trial(subject(str(warm_base())), warm_base(), folder)
    results = [run_check(check, trial) for check in reaching(subject)]
    alarms = tuple(f"{r.check}: {r.message}" for r in results if r.status in ("failed", "error"))
    return Silence(id, alarms, time.perf_counter() - began_s)
