"""Practices that look like a mistake from outside pass the very check that would take them for one.

Run: pytest tests/testing/checks/test_practices.py; all checks on all practices: glm4ft faults
"""

from __future__ import annotations

from pathlib import Path

import pytest

from glm4ft.testing.checks import all_checks
from glm4ft.testing.faults.variations import all_variations
from glm4ft.testing.trial.trial import Trial

CHECKS = {check.name: check for check in all_checks()}


@pytest.mark.parametrize(
    ("practice", "check"),
    [
        ("second-pass-over-the-batch", "evaluation_runs_in_eval_mode"),
        ("second-pass-over-the-batch", "numbers_that_are_not_finite_are_reported"),
        ("evaluation-in-inference-mode", "no_gradient_leaks_between_packed_rows"),
        ("rate-in-a-tensor", "logged_learning_rate_is_the_one_applied"),
        ("flat-master-copy", "optimizer_holds_every_trained_parameter"),
    ],
)
def test_practice_passes(practice: str, check: str, healthy: Trial, tmp_path: Path) -> None:
    subject = all_variations()[practice].subject(str(healthy.base_dir))
    CHECKS[check].run(Trial(subject, healthy.base_dir, tmp_path))
