"""Runs the checks on a subject: what ``glm4ft check`` does, and what a pytest suite parametrises over."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from glm4ft.errors import ConfigError, InputError, RunError
from glm4ft.testing import checks
from glm4ft.testing.checks.registry import CHECKS, STAGES, Check, CheckFailed, NotApplicable
from glm4ft.testing.checks.trial import Trial
from glm4ft.testing.subject import load_subject, parts
from glm4ft.tiny import write_tiny_base

Status = Literal["passed", "failed", "error", "skipped", "expected-failure"]
OWN_SUBJECT = "glm4ft.testing.subjects.own:Subject"


@dataclass(frozen=True)
class Result:
    """What became of one check.

    Args:
        check: its name.
        stage: that it judges.
        status: ``error`` if the subject broke down instead of giving a wrong result.
        message: why it did not pass; "" if it did.
        seconds: it took.
        error: that the subject raised, if it broke down.
    """

    check: str
    stage: str
    status: Status
    message: str
    seconds: float
    error: Exception | None = field(default=None, compare=False)


def all_checks() -> list[Check]:
    """Every check, in the order of the stages."""
    for module in pkgutil.iter_modules(checks.__path__):
        importlib.import_module(f"{checks.__name__}.{module.name}")
    return sorted(CHECKS, key=lambda check: STAGES.index(check.stage))


def run_checks(
    trial: Trial, checks: Sequence[Check], *, expected_failures: Mapping[str, str] | None = None
) -> Iterator[Result]:
    """Run checks one after the other.

    Args:
        trial: of the subject.
        checks: to run.
        expected_failures: check to the reason why it is known to fail. Strict: one that passes is a failure, so that
            the entry goes when the fault does.
    Yields:
        A result per check, as soon as it is there.
    Raises:
        ConfigError: if an expected failure names no check.
    """
    expected = require_known(expected_failures or {}, checks)
    for check in checks:
        yield run_check(check, trial, expected.get(check.name, ""))


def require_known(expected_failures: Mapping[str, str], checks: Sequence[Check] = ()) -> Mapping[str, str]:
    """Refuse entries that name no check: they would stay when the check is renamed.

    Args:
        expected_failures: check to reason.
        checks: that may be named beside those of the suite.
    Raises:
        ConfigError: naming them.
    """
    unknown = set(expected_failures) - {check.name for check in (*checks, *all_checks())}
    if unknown:
        raise ConfigError("an expected failure names no check", found=", ".join(sorted(unknown)))
    return expected_failures


def run_check(check: Check, trial: Trial, expected: str = "") -> Result:
    """Run one check.

    Args:
        check: to run.
        trial: of the subject.
        expected: why it is known to fail; "" if it is not.
    """
    began_s = time.perf_counter()
    status, message, error = _run(check, trial)
    if expected:
        status, message = _expect(status, message, expected)
    return Result(check.name, check.stage, status, message, time.perf_counter() - began_s, error)


def check_subject(
    spec: str, *, expected_failures: Mapping[str, str] | None = None, stages: Sequence[str] = STAGES
) -> Iterator[Result]:
    """Put a subject on trial on the built-in base.

    Args:
        spec: ``MODULE:ATTR``.
        expected_failures: as for ``run_checks``, beside those that the subject itself lists.
        stages: to judge.
    Yields:
        A result per check.
    """
    with trial_of(spec) as trial:
        yield from judge(trial, expected_failures=expected_failures, stages=stages)


@contextlib.contextmanager
def trial_of(spec: str) -> Iterator[Trial]:
    """A trial of a subject on the built-in base; what it wrote is gone afterwards."""
    num_threads = torch.get_num_threads()
    # the base's matrices are too small to share out: two threads were measured 12 times slower on a busy machine
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="glm4ft-check-") as name:
            folder = Path(name)
            base_dir = write_tiny_base(folder / "base")
            yield Trial(load_subject(spec, base_dir), base_dir, folder, spec)
    finally:
        torch.set_num_threads(num_threads)


def judge(
    trial: Trial, *, expected_failures: Mapping[str, str] | None = None, stages: Sequence[str] = STAGES
) -> Iterator[Result]:
    """Run all checks of some stages; arguments and results as for ``check_subject``."""
    checks = [check for check in all_checks() if check.stage in stages]
    expected = {**known_failures(trial.subject), **(expected_failures or {})}
    yield from run_checks(trial, checks, expected_failures=expected)


def known_failures(subject: Any) -> Mapping[str, str]:
    """The subject's own list of checks that it is known to fail, with the evidence."""
    return dict(getattr(subject, "expected_failures", None) or {})


def _run(check: Check, trial: Trial) -> tuple[Status, str, Exception | None]:
    missing = sorted(check.needs - parts(trial.subject))
    if missing:
        return "skipped", f"the subject has no {', '.join(missing)}", None
    try:
        check.run(trial)
    except CheckFailed as error:
        return "failed", str(error), None
    except NotApplicable as error:
        return "skipped", str(error), None
    except NotImplementedError as error:
        return "skipped", f"the subject does not offer this: {error}", None
    except (InputError, RunError) as error:
        return "error", str(error), error
    except Exception as error:  # whatever a foreign pipeline raises is a result, not our crash
        return "error", f"{type(error).__name__}: {error}", error
    return "passed", "", None


def _expect(status: Status, message: str, reason: str) -> tuple[Status, str]:
    if status in ("failed", "error"):
        return "expected-failure", f"{reason}: {message}"
    if status == "passed":
        return "failed", f"expected to fail ({reason}), but it passes: remove the entry"
    return status, message


def summary(spec: str, results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """The results as ``glm4ft check --json`` writes them."""
    names = ("check", "stage", "status", "message")
    return {
        "schema": 1,
        "subject": spec,
        "checks": [{name: getattr(result, name) for name in names} for result in results],
        "seconds": seconds,
    }
