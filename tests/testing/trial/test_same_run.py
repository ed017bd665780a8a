"""Two runs that should be one are compared bit by bit; only gradients that round in another way end the comparison.

Run: pytest tests/testing/trial/test_same_run.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glm4ft.testing.recording.trace import Step, Trace
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.same_run import describe_divergence
from glm4ft.testing.trial.stages import NotApplicable

STATE: Any = None


def run(gradient: float, update: float) -> RecordedRun:
    """A run of one step on one row, with a gradient and an update of two entries."""
    raw, before = {"a": torch.tensor([gradient, 1.0])}, {"a": torch.tensor([1.0, 2.0])}
    after = {"a": before["a"] + torch.tensor([update, 0.5])}
    step = Step([], raw, dict(raw), before, [], "AdamW", after)
    found = RecordedRun({}, [], Trace(steps=[step]), [], model=None, reference=STATE)
    found.__dict__["order"] = [[(1, 2)]]
    return found


def test_equal_runs_do_not_diverge() -> None:
    assert describe_divergence(run(1.0, 0.25), run(1.0, 0.25)) == ""


def test_gradient_that_rounds_in_another_way_is_not_judged() -> None:
    with pytest.raises(NotApplicable, match="step 1 on: gradients of the same parameters and rows differ by rounding"):
        describe_divergence(run(1.0, 0.25), run(1 + 2**-23, 0.25 + 2**-22))


@pytest.mark.parametrize(
    ("gradient", "update", "cause"),
    [
        pytest.param(1.0, 0.25 + 2**-22, "though its gradient is the same", id="equal gradients"),
        pytest.param(1 + 2**-23, 0.3, "and so does its gradient on the same rows", id="another update"),
        pytest.param(1 + 2**-23, float("nan"), "and so does its gradient", id="no number"),
    ],
)
def test_what_rounding_does_not_explain_diverges(
    gradient: float, update: float, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm4ft.testing.trial.same_run._forward_cause", lambda run, step: "")
    assert cause in describe_divergence(run(1.0, 0.25), run(gradient, update))
