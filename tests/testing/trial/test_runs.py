"""What a run logged is read by the number of its step, however the log counts.

Run: pytest tests/testing/trial/test_runs.py
"""

from __future__ import annotations

from typing import Any

import pytest

from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.stages import NotApplicable

NOTHING: Any = None


@pytest.mark.parametrize(
    ("log", "losses", "evaluated"),
    [
        ([{"loss": 3.0}, {"loss": 2.0, "eval_loss": 1.5}], {1: 3.0, 2: 2.0}, {2: 1.5}),
        ([{"step": 3, "loss": 2.0}, {"step": 6, "loss": None, "eval_loss": 1.5}], {3: 2.0}, {6: 1.5}),
        ([{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0, "eval_loss": 1.5}], {1: 3.0, 2: 2.0}, {2: 1.5}),
        ([{"step": 0, "eval_loss": 4.0}, {"step": 1, "loss": 3.0}], {1: 3.0}, {0: 4.0}),
    ],
    ids=["without numbers", "now and then", "from 0", "evaluated before the first step"],
)
def test_log_is_read_by_steps_from_one(
    log: list[dict[str, Any]], losses: dict[int, float], evaluated: dict[int, float]
) -> None:
    run = RecordedRun({}, [], Trace(), log, model=None, reference=NOTHING)
    assert run.logged("loss") == losses
    assert run.logged("eval_loss") == evaluated


def test_figure_that_is_not_logged_is_not_judged() -> None:
    run = RecordedRun({}, [], Trace(), [{"step": 0, "loss": 3.0}], model=None, reference=NOTHING)
    with pytest.raises(NotApplicable, match="no log with grad_norm"):
        run.logged("grad_norm")
