"""``glm4ft check`` on real weights: trainers are judged by the template of a checkpoint outside the GLM-4 family.

Run: tox run -e weights -- -k checks
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from glm4ft.testing.checks import all_checks
from glm4ft.testing.trial.runner import known_failures, run_check, run_checks, trial_of

pytestmark = pytest.mark.weights

SUBJECTS = "glm4ft.testing.subjects"
# What the other stages claim is judged on the runs of these plans too; several processes and resumed runs are left to
# the built-in base.
STAGES = ("rows", "model", "gradient", "clipping", "schedule", "update", "outcome")


@pytest.mark.parametrize("subject", ["own", "transformers_trainer", "trl"])
def test_rows_are_judged_by_the_template(subject: str, base: Path) -> None:
    """Without training, in seconds: the mask, the stop, the prompt and the flags of the bank of conversations."""
    if subject == "trl" and importlib.util.find_spec("trl") is None:
        pytest.skip("needs the extra peers; found no trl")
    encoded = [check for check in all_checks() if check.stage == "rows" and "train" not in check.needs]
    checks = [check for check in encoded if check.name != "no_stale_ids_are_used"]  # which trains
    with trial_of(f"{SUBJECTS}.{subject}:Subject", str(base)) as trial:
        known = known_failures(trial.subject)
        results = [run_check(check, trial, known.get(check.name, "")) for check in checks]
    assert [f"{r.check}: {r.message}" for r in results if r.status in ("failed", "error")] == []
    judged = {r.check for r in results if r.status != "skipped"}
    assert {"mask_is_what_the_model_must_sample", "every_turn_ends_in_one_stop"} <= judged


@pytest.mark.slow
def test_own_trainer_passes_on_a_real_base(base: Path) -> None:
    with trial_of(f"{SUBJECTS}.own:Subject", str(base)) as trial:
        results = list(run_checks(trial, all_checks(), stages=STAGES))
    assert [f"{r.check}: {r.message}" for r in results if r.status in ("failed", "error")] == []
    assert Counter(r.status for r in results)["passed"] > 35
