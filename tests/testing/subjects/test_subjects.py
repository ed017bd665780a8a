"""Every stage of other trainers gets a verdict; all failures are listed as known, and everything else passes.

Run: tox run -e peers
It takes a minute, so it runs only where the extra ``peers`` is installed.
"""

from __future__ import annotations

import importlib.util

import pytest

from glm4ft.testing.checks import all_checks
from glm4ft.testing.trial.runner import check_subject
from glm4ft.testing.trial.stages import STAGES
from glm4ft.testing.trial.verdicts import stage_verdicts

PLAIN_TRAINER = "glm4ft.testing.subjects.transformers_trainer:Subject"
TRL = "glm4ft.testing.subjects.trl:Subject"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the extra peers; found no trl"),
]


@pytest.mark.parametrize(
    ("spec", "departs_at"),
    [(PLAIN_TRAINER, ["gradient", "side-effects"]), (TRL, ["rows", "side-effects", "outcome"])],
    ids=["transformers", "trl"],
)
def test_a_trainer_gets_a_verdict_for_every_stage(spec: str, departs_at: list[str]) -> None:
    """A known failure that passes, or a failure that is not known, fails this test."""
    results = list(check_subject(spec, all_checks()))
    wrong = [f"{result.check}: {result.message}" for result in results if result.status in ("failed", "error")]
    assert not wrong, "\n".join(wrong)
    expected = {stage: "expected failure" if stage in departs_at else "passed" for stage in STAGES}
    assert stage_verdicts((result.stage, result.status) for result in results) == expected
