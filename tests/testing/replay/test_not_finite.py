"""A number that is not finite departs from the specification wherever it stands in a recording, and never passes.

Run: pytest tests/testing/replay/test_not_finite.py
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.replay.departure import Departure
from glm4ft.testing.replay.replay import Verdict, replay
from glm4ft.testing.replay.tolerances import within
from glm4ft.testing.trial.trial import Trial

FORWARD, STEP = ("hidden_BTD", "gradient_BTD"), ("raw", "clipped", "before", "after")


@pytest.fixture(scope="module")
def recorded(healthy: Trial) -> Any:
    return healthy.run(steps=2)


def spoilt(trace: Trace, field: str, step: int, at: float, value: float) -> Trace:
    """The trace with one entry of one tensor replaced."""
    trace = copy.deepcopy(trace)
    if field in FORWARD:
        forwards = trace.steps[step].forwards
        tensor = getattr(forwards[int(at * len(forwards))], field)
    else:
        tensors = getattr(trace.steps[step], field)
        tensor = tensors[sorted(tensors)[int(at * len(tensors))]]
    flat = tensor.view(-1)
    flat[int(at * len(flat))] = value
    return trace


@settings(max_examples=60)
@given(
    field=st.sampled_from(FORWARD + STEP),
    step=st.integers(0, 1),
    at=st.floats(0, 1, exclude_max=True),
    value=st.sampled_from((math.nan, math.inf, -math.inf)),
)
def test_entry_that_is_not_finite_departs(recorded: Any, field: str, step: int, at: float, value: float) -> None:
    """Hidden states of padding alone may hold anything: nothing reads them."""
    trace = spoilt(recorded.trace, field, step, at, value)
    forward = trace.steps[step].forwards[int(at * len(trace.steps[step].forwards))]
    if field == "hidden_BTD":
        padding = recorded.known.find_in(forward).padding_BT
        if bool(padding[~torch.isfinite(forward.hidden_BTD).all(-1)].all()):
            return
    verdict = replay(trace, recorded.reference, recorded.rows, recorded.plan)
    assert verdict.departure is not None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_size_that_is_not_finite_is_over_every_limit(value: float) -> None:
    assert not within("any", value, 1e300)


def test_recording_that_was_not_spoilt_agrees(recorded: Any) -> None:
    assert replay(recorded.trace, recorded.reference, recorded.rows, recorded.plan).departure is None


def test_model_and_gradient_departures_of_one_scale_are_told_as_the_model_s() -> None:
    """The factor comes from the departure's field; a message is never read back."""
    from glm4ft.testing.replay.replay import _explain_by_scale

    gradient = Departure("gradient", 1, "off", "something in words", 1.0, factor=0.5)
    verdict = Verdict({"gradient": gradient, "model": Departure("model", 2, "off", "", 0.1)})
    _explain_by_scale(verdict, first_moved=2)
    assert list(verdict.departures) == ["model"]
    assert "0.5 times" in verdict.departures["model"].cause
