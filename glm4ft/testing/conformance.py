"""The conformance suite as pytest tests, for this repository and any other.

A repository with a fine-tuning pipeline describes it as a subject (``glm4ft.testing.subject``) and needs three lines::

    from glm4ft.testing.conformance import parametrize_with_checks

    @parametrize_with_checks("my_trainer.adapter:Subject", expected_failures={"loss_flag_is_honoured": "our issue 12"})
    def test_conformance(glm4ft_check): glm4ft_check()

Every check is one test, named ``stage-check``: ``pytest -k rows`` runs the checks of a stage. A known failure is listed
with a reason and reported as xfailed. It is strict: if its check passes, the test fails until the entry is removed.
Checks that do not apply are skipped with the reason. ``--glm4ft-subject MODULE:ATTR`` names the subject for a
``parametrize_with_checks()`` that names none, ``--glm4ft-model`` the base. Checks share the runs that they judge, so
with pytest-xdist pass ``--dist loadfile``: otherwise every worker trains the runs again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from glm4ft.model.checkpoint import find_checkpoint
from glm4ft.testing.checks import all_checks
from glm4ft.testing.session.gpu_lane import Bases, is_large, why_left_out
from glm4ft.testing.session.records import attach_check
from glm4ft.testing.subject import load_subject
from glm4ft.testing.trial.heavy_bases import is_heavy, spare
from glm4ft.testing.trial.registry import Check
from glm4ft.testing.trial.report import explain_trial, supervised_by
from glm4ft.testing.trial.runner import Result, known_failures, require_known_checks, run_check
from glm4ft.testing.trial.stages import STAGES
from glm4ft.testing.trial.trial import Trial
from glm4ft.testing.trial.wiring import unwired
from glm4ft.testing.trial.wording import WRONG
from glm4ft.text.safe_text import visible


class SubjectBrokeDown(Exception):
    """The pipeline raised an error in a check instead of giving a result."""


@dataclass
class Trials:
    """The trials of a session: one per subject and dtype, made when the first check needs it.

    Args:
        bases: The base in each dtype.
        folder: The folder for the files of checks and subjects.
        default_subject: The subject as ``MODULE:ATTR`` for checks that name none.
    """

    bases: Bases
    folder: Path
    default_subject: str
    _trials: dict[tuple[str, str], Trial] = field(default_factory=dict)

    def trial(self, spec: str, dtype: str) -> Trial:
        """The trial of a subject on the base in a dtype."""
        if (spec, dtype) not in self._trials:
            self._trials[spec, dtype] = self._make(spec, dtype)
        return self._trials[spec, dtype]

    def unwired(self, spec: str, dtype: str) -> str:
        """The sentence that a subject is not wired to its repository's code yet; "" if it is, or was never loaded."""
        trial = self._trials.get((spec, dtype))
        return unwired(trial.subject) if trial else ""

    def _make(self, spec: str, dtype: str) -> Trial:
        folder, base_dir = self.folder / str(len(self._trials)), find_checkpoint(self.bases.get(dtype), weights=True)
        folder.mkdir()
        trial = Trial(load_subject(spec, base_dir), base_dir, folder, spec, self.bases.spec)
        trial.require_recent_libraries()
        if is_large(self.bases.spec) or is_heavy(base_dir):
            spare(trial)
        return trial

    def run(self, check: Check, spec: str, dtype: str, expected_failures: Mapping[str, str]) -> Result:
        """Run a check on a subject; it is skipped if it is left out on this base."""
        reason = why_left_out(self.bases.spec, check.name, dtype)
        if reason:
            return Result(check.name, check.stage, "skipped", reason, 0.0)
        trial = self.trial(spec, dtype)
        expected = {**known_failures(trial.subject), **expected_failures}
        result = run_check(check, trial, expected.get(check.name, ""))
        trial.release_models()
        return result


@dataclass(frozen=True)
class BoundCheck:
    """A check together with the subject and the dtype that it runs on.

    Args:
        check: The check to run.
        subject: The subject as ``MODULE:ATTR``; "" for the one that the command line names.
        expected_failures: Check names mapped to the reason why the check is known to fail.
        dtype: The dtype of the base, ``bf16`` or ``fp32``; "" for that of the base as it is.
    """

    check: Check
    subject: str
    expected_failures: Mapping[str, str]
    dtype: str

    def run(self, node: pytest.Item, trials: Trials) -> None:
        """Run the check, attach the result to the report of the test, and pass the outcome to pytest."""
        __tracebackhide__ = True
        spec = self.subject or trials.default_subject
        result = trials.run(self.check, spec, self.dtype, self.expected_failures)
        note = trials.unwired(spec, self.dtype)
        if result.status in WRONG:
            trial = trials.trial(spec, self.dtype)
            attach_check(node, spec, result, self.dtype, supervised=supervised_by(trial), unwired=note)
            _show_card(node, spec, result, trial)
        else:
            attach_check(node, spec, result, self.dtype, unwired=note)
        _conclude(result)

    @property
    def id(self) -> str:
        """The id of the test that pytest shows."""
        return f"{self.check.stage}-{self.check.name}"

    def explain(self) -> str:
        """Lines that state what the check claims, which incident motivates it, and the subject."""
        claim = " ".join((self.check.run.__doc__ or "").split())
        facts = {"claim": claim, "incident": self.check.incident, "subject": self.subject}
        return "\n".join(f"{label + ':':<10}{visible(text, newlines=False)}" for label, text in facts.items() if text)


def parametrize_with_checks(
    subject: str = "",
    *,
    expected_failures: Mapping[str, str] | None = None,
    stages: Sequence[str] = STAGES,
    dtypes: Sequence[str] = ("",),
) -> pytest.MarkDecorator:
    """Make a test function run once per check.

    Args:
        subject: The subject as ``MODULE:ATTR``; by default the one that ``--glm4ft-subject`` names.
        expected_failures: Check names mapped to the reason why the check is known to fail, beside those that the
            subject itself lists.
        stages: The stages to judge.
        dtypes: The dtypes of the base, ``fp32`` or ``bf16``; all checks run once in each. By default the base keeps
            its own.
    Returns:
        A decorator for a function that accepts ``glm4ft_check`` and calls it.
    Raises:
        ConfigError: If an expected failure names no check.
    """
    suite, expected = all_checks(), expected_failures or {}
    require_known_checks(expected, suite)
    checks = [check for check in suite if check.stage in stages]
    bound = [BoundCheck(check, subject, expected, dtype) for dtype in dtypes for check in checks]
    params = [pytest.param(one, id=one.id if len(dtypes) == 1 else f"{one.id}-{one.dtype}") for one in bound]
    return pytest.mark.parametrize("glm4ft_check", params, indirect=True)


def _show_card(node: pytest.Item, spec: str, result: Result, trial: Trial) -> None:
    """Add the failure card of the overfit run to the test's report, once per trial: all its failures have the same."""
    card = explain_trial(spec, [result], trial)
    if card and not trial.shared.get("card is shown"):
        trial.shared["card is shown"] = True
        node.add_report_section("call", "glm4ft: the run that did not learn", card)


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
