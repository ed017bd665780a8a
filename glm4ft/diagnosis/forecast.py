"""How many more steps a falling loss needs: an extrapolation, with an interval that says how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_STEPS = 100_000
_LEAST_POINTS = 6
_PARTS = (2, 3, 4)  # the last half, third and quarter of a curve
_RIVAL = 4.0  # a fit counts as long as its squared error is at most this many times the best one's
_EXACT = 1e-8  # squared error per point below which fits are as good as each other


@dataclass(frozen=True)
class Forecast:
    """When a target loss will be reached if the curve goes on as it went.

    Args:
        steps: further steps, by the fit that suits the curve best.
        earliest: by the steepest fit that the curve allows.
        latest: by the flattest one; None if that never gets there.
    """

    steps: int
    earliest: int
    latest: int | None

    def describe(self) -> str:
        """The forecast in words."""
        if self.latest is None:
            return f"about {self.steps:,} more steps (at least {self.earliest:,}; the curve sets no upper bound)"
        return f"about {self.steps:,} more steps (between {self.earliest:,} and {self.latest:,})"


@dataclass(frozen=True)
class _Fit:
    """A straight line through logarithms of the distance to the floor, over steps or over their logarithms."""

    slope: float
    slope_error: float
    squared_error: float  # per point
    is_power_law: bool

    def steps(self, distance: float, at: int, num_errors: float) -> int | None:
        """Further steps after step ``at`` until the distance has fallen by a factor ``exp(distance)``."""
        slope = self.slope + num_errors * self.slope_error
        if not slope < 0:
            return None
        exponent = max(distance, 0.0) / -slope
        if self.is_power_law:
            exponent = at * math.expm1(exponent) if exponent < 50 else math.inf
        return math.ceil(exponent) if exponent <= MOST_STEPS else None


def forecast(losses: Sequence[float], target: float, floor: float = 0.0) -> Forecast | None:
    """Extrapolate the distance from the floor, as an exponential and as a power of the step.

    Which of the two the curve follows, and how steadily, it says itself: both are fitted to its last half, third and
    quarter, and the interval spans all fits that suit it nearly as well as the best, with twice their standard error.

    Args:
        losses: of the steps, finite.
        target: loss to reach.
        floor: certified floor of the loss.
    Returns:
        The forecast; None if the loss does not fall, the target is reached, or is not above the floor.
    """
    distances = np.array([loss - floor for loss in losses], dtype=np.float64)
    if len(distances) < _LEAST_POINTS or not target > floor or not losses[-1] > target or not (distances > 0).all():
        return None
    fits = list(_fits(np.log(distances)))
    best = min(fits, key=lambda fit: fit.squared_error)
    rivals = [fit for fit in fits if fit.squared_error <= _RIVAL * best.squared_error + _EXACT]
    distance, at = math.log(float(np.median(distances[-3:])) / (target - floor)), len(losses)
    steps = best.steps(distance, at, 0.0)
    if steps is None:
        return None
    earliest = [found for fit in rivals if (found := fit.steps(distance, at, -2.0)) is not None]
    latest = [fit.steps(distance, at, 2.0) for fit in rivals]
    known = [found for found in latest if found is not None]
    return Forecast(steps, min([*earliest, steps]), max([*known, steps]) if len(known) == len(latest) else None)


def _fits(logs: np.ndarray[Any, Any]) -> Iterator[_Fit]:
    steps = np.arange(1, len(logs) + 1, dtype=np.float64)
    for part in _PARTS:
        tail = slice(-max(_LEAST_POINTS, len(logs) // part), None)
        yield _fit(steps[tail], logs[tail], is_power_law=False)
        yield _fit(np.log(steps[tail]), logs[tail], is_power_law=True)


def _fit(at: np.ndarray[Any, Any], logs: np.ndarray[Any, Any], *, is_power_law: bool) -> _Fit:
    """By least squares."""
    at = at - at.mean()
    slope = float(at @ logs / (at @ at))
    residual = logs - logs.mean() - slope * at
    squares = float(residual @ residual)
    error = math.sqrt(squares / max(len(at) - 2, 1) / float(at @ at))
    return _Fit(slope, error, squares / len(at), is_power_law)
