"""The conformance suite as pytest tests, for this repository and any other.

A repository with a fine-tuning pipeline describes it as a subject (``glm4ft.testing.subject``) and needs three lines::

    from glm4ft.testing.conformance import parametrize_with_checks

    @parametrize_with_checks("my_trainer.adapter:Subject", expected_failures={"loss_flag_is_honoured": "our issue 12"})
    def test_conformance(glm4ft_check): glm4ft_check()

Every check is a test of its own, named ``stage-check``: ``pytest -k rows`` runs the checks of a stage. A known failure
is data with a reason, reported as xfailed, and strict: when its check passes the test fails, so the entry has to go.
Checks that do not apply are skipped with the reason. ``--glm4ft-subject MODULE:ATTR`` names the subject of a
``parametrize_with_checks()`` that names none, ``--glm4ft-model`` the base. Checks share the runs that they judge, so
with pytest-xdist give ``--dist loadfile``: otherwise every worker trains them anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from glm4ft.report.safe_text import visible
from glm4ft.testing.checks.registry import STAGES, Check
from glm4ft.testing.checks.trial import Trial
from glm4ft.testing.plugin_records import attach_check
from glm4ft.testing.runner import Result, all_checks, known_failures, require_known, run_check
from glm4ft.testing.subject import load_subject


class SubjectBrokeDown(Exception):
    """The pipeline raised an error in a check, instead of giving a right or a wrong result."""


@dataclass
class Bench:
    """Where trials are held: one per subject, made when the first check asks for it.

    Args:
        base_dir: folder of the base.
        folder: for what checks and subjects write.
        default_subject: ``MODULE:ATTR`` for checks that name none.
    """

    base_dir: Path
    folder: Path
    default_subject: str
    _trials: dict[str, Trial] = field(default_factory=dict)

    def trial(self, spec: str) -> Trial:
        """The trial of a subject."""
        if spec not in self._trials:
            folder = self.folder / str(len(self._trials))
            folder.mkdir()
            self._trials[spec] = Trial(load_subject(spec, self.base_dir), self.base_dir, folder, spec)
        return self._trials[spec]


@dataclass(frozen=True)
class BoundCheck:
    """A check with the subject it is meant for.

    Args:
        check: to run.
        subject: ``MODULE:ATTR``; "" for the one that the command line names.
        expected_failures: check to the reason why it is known to fail.
    """

    check: Check
    subject: str
    expected_failures: Mapping[str, str]

    def run(self, node: pytest.Item, bench: Bench) -> None:
        """Run the check and give pytest the outcome; the result is attached to the report of the test."""
        __tracebackhide__ = True
        spec = self.subject or bench.default_subject
        trial = bench.trial(spec)
        expected = {**known_failures(trial.subject), **self.expected_failures}
        result = run_check(self.check, trial, expected.get(self.check.name, ""))
        attach_check(node, spec, result)
        _conclude(result)

    def explain(self) -> str:
        """What the check claims, and why it exists."""
        claim = " ".join((self.check.run.__doc__ or "").split())
        facts = {"claim": claim, "incident": self.check.incident, "subject": self.subject}
        return "\n".join(f"{label + ':':<10}{visible(text, newlines=False)}" for label, text in facts.items() if text)


def parametrize_with_checks(
    subject: str = "", *, expected_failures: Mapping[str, str] | None = None, stages: Sequence[str] = STAGES
) -> pytest.MarkDecorator:
    """Make a test function run once per check.

    Args:
        subject: ``MODULE:ATTR``; by default the one that ``--glm4ft-subject`` names.
        expected_failures: check to the reason why it is known to fail, beside those that the subject itself lists.
        stages: to judge.
    Returns:
        A decorator for a function that takes ``glm4ft_check`` and calls it.
    Raises:
        ConfigError: if an expected failure names no check.
    """
    expected = require_known(expected_failures or {})
    checks = [check for check in all_checks() if check.stage in stages]
    bound = [pytest.param(BoundCheck(check, subject, expected), id=f"{check.stage}-{check.name}") for check in checks]
    return pytest.mark.parametrize("glm4ft_check", bound, indirect=True)


def _conclude(result: Result) -> None:
    __tracebackhide__ = True
    lines = [visible(line, newlines=False) for line in result.message.split("\n")]
    if result.status == "failed":
        pytest.fail("\n".join(lines), pytrace=False)
    if result.status == "skipped":
        pytest.skip(lines[0])
    if result.status == "expected-failure":
        pytest.xfail(lines[0])
    if result.status == "error":
        raise SubjectBrokeDown("\n".join(lines)) from result.error
