"""Runs the checks on a subject, for ``glm4ft check`` and for the pytest suite."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from glm4ft.errors import ConfigError, InputError, RunError
from glm4ft.model.checkpoint import TINY, find_checkpoint
from glm4ft.model.tiny import TINY_BASES, write_tiny_base
from glm4ft.testing.specification.lora_spec import NotSpecified
from glm4ft.testing.subject import load_subject, parts
from glm4ft.testing.trial.heavy_bases import is_heavy, spare
from glm4ft.testing.trial.registry import Check
from glm4ft.testing.trial.stages import STAGES, CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial
from glm4ft.testing.trial.verdicts import group_failures

Status = Literal["passed", "failed", "error", "skipped", "expected-failure"]


@dataclass(frozen=True)
class Result:
    """The result of one check.

    Args:
        check: The name of the check.
        stage: The stage that the check judges.
        status: The outcome; ``error`` if the subject raised an error instead of giving a wrong result.
        message: The reason why the check did not pass; "" if it did.
        seconds: The duration of the check.
        error: The error that the subject raised; None if it raised none.
        cause: The cause that a failed check found; "" if it found none.
    """

    check: str
    stage: str
    status: Status
    message: str
    seconds: float
    error: Exception | None = field(default=None, compare=False)
    cause: str = ""


def run_checks(
    trial: Trial,
    checks: Sequence[Check],
    *,
    expected_failures: Mapping[str, str] | None = None,
    stages: Sequence[str] = STAGES,
) -> Iterator[Result]:
    """Run checks one after the other.

    Args:
        trial: The subject on its base.
        checks: The checks of the suite.
        expected_failures: Check names mapped to the reason why the check is known to fail, beside those that the
            subject itself lists. They are strict: a check that passes is a failure, so outdated entries are noticed.
        stages: The stages to judge; checks of other stages are not run.
    Yields:
        One result per check, as soon as the check ends.
    Raises:
        ConfigError: If an expected failure names no check.
    """
    expected = {**known_failures(trial.subject), **(expected_failures or {})}
    require_known_checks(expected, checks)
    for check in checks:
        if check.stage in stages:
            yield run_check(check, trial, expected.get(check.name, ""))
            trial.release_models()


def require_known_checks(expected_failures: Mapping[str, str], checks: Sequence[Check]) -> None:
    """Refuse expected failures that name no check, so that an entry cannot outlive a renamed check.

    Args:
        expected_failures: Check names mapped to reasons.
        checks: The checks that may be named.
    Raises:
        ConfigError: If a name belongs to no check; the message lists these names.
    """
    unknown = set(expected_failures) - {check.name for check in checks}
    if unknown:
        raise ConfigError("an expected failure names no check", found=", ".join(sorted(unknown)))


def run_check(check: Check, trial: Trial, expected: str = "") -> Result:
    """Run one check.

    Args:
        check: The check to run.
        trial: The trial of the subject.
        expected: The reason why the check is known to fail; "" if it is not.
    """
    began_s = time.perf_counter()
    status, message, error = _run(check, trial)
    if expected:
        status, message = _expect(status, message, expected)
    cause = error.cause if isinstance(error, CheckFailed) else ""
    return Result(check.name, check.stage, status, message, time.perf_counter() - began_s, error, cause)


def check_subject(
    spec: str,
    checks: Sequence[Check],
    *,
    expected_failures: Mapping[str, str] | None = None,
    stages: Sequence[str] = STAGES,
) -> Iterator[Result]:
    """Run checks on a subject, on the built-in base.

    Args:
        spec: The subject as ``MODULE:ATTR``.
        checks: The checks of the suite.
        expected_failures: The known failures, as for ``run_checks``.
        stages: The stages to judge, as for ``run_checks``.
    Yields:
        One result per check.
    """
    with trial_of(spec) as trial:
        yield from run_checks(trial, checks, expected_failures=expected_failures, stages=stages)


@contextlib.contextmanager
def trial_of(spec: str, base: str = TINY) -> Iterator[Trial]:
    """Open a trial of a subject; its files are deleted when the context ends.

    Args:
        spec: The subject as ``MODULE:ATTR``.
        base: The base: ``tiny``, ``tiny-glm4-ids`` (the same with GLM-4's own ids), ``tiny:`` and the name of a
            chat format (the same for its checkpoints), or a checkpoint's folder.
    Raises:
        ModelError: If the base has experts and a library is too old for them to be judged.
    """
    num_threads = torch.get_num_threads()
    # the base's matrices are too small for several threads: two were measured 12 times slower on a busy machine
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="glm4ft-check-") as name:
            folder = Path(name)
            base_dir = _base_dir(base, folder / "base")
            trial = Trial(load_subject(spec, base_dir), base_dir, folder, spec, base)
            trial.require_recent_libraries()
            if is_heavy(base_dir):
                spare(trial)
            with _imports_kept_from_the_collector():
                yield trial
    finally:
        torch.set_num_threads(num_threads)


@contextlib.contextmanager
def _imports_kept_from_the_collector() -> Iterator[None]:
    """Accelerate collects garbage after every run, which took 20 s of a trial of 70 s for what the imports had made."""
    if gc.get_freeze_count():  # the caller did the same
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _base_dir(base: str, folder: Path) -> Path:
    return write_tiny_base(folder, **TINY_BASES[base]) if base in TINY_BASES else find_checkpoint(base)


def known_failures(subject: Any) -> Mapping[str, str]:
    """The checks that the subject itself lists as known to fail, mapped to the evidence."""
    return dict(getattr(subject, "expected_failures", None) or {})


def _run(check: Check, trial: Trial) -> tuple[Status, str, Exception | None]:
    missing = sorted(check.needs - parts(trial.subject))
    if missing:
        return "skipped", f"the subject has no {', '.join(missing)}", None
    try:
        check.run(trial)
    except CheckFailed as error:
        return "failed", str(error), error
    except NotApplicable as error:
        return "skipped", str(error), None
    except NotSpecified as error:  # what nobody asked for is told once, by the check of what is trained
        return "skipped", f"not judged: {error}", None
    except NotImplementedError as error:
        return "skipped", f"the subject does not offer this: {error}", None
    except (InputError, RunError) as error:
        return "error", str(error), error
    except Exception as error:  # an error in a foreign pipeline is a result of the check, not a crash of the suite
        return "error", f"{type(error).__name__}: {error}", error
    return "passed", "", None


def _expect(status: Status, message: str, reason: str) -> tuple[Status, str]:
    if status in ("failed", "error"):
        return "expected-failure", f"{reason}: {message}"
    if status == "passed":
        return "failed", f"expected to fail ({reason}), but it passes: remove the entry"
    return status, message


def results_record(spec: str, results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """The results in the form that ``glm4ft check --json`` writes."""
    names = ("check", "stage", "status", "message", "cause")
    return {
        "schema": 1,
        "subject": spec,
        "checks": [{name: getattr(result, name) for name in names} for result in results],
        "causes": [vars(group) for group in group_failures(results)],
        "seconds": seconds,
    }
