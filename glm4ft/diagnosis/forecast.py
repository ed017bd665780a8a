"""A forecast of the further steps that a falling loss needs to reach its target, with an interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_STEPS = 100_000
_LEAST_POINTS = 6
_PARTS = (2, 3, 4)  # the last half, third and quarter of a curve
_RIVAL = 4.0  # a fit is considered if its squared error is at most this many times that of the best one
_EXACT = 1e-8  # squared error per point below which all fits are considered equally good


@dataclass(frozen=True)
class Forecast:
    """The number of further steps to a target loss, if the curve continues as before.

    Args:
        steps: The number by the fit that suits the curve best.
        earliest: The number by the steepest plausible fit.
        latest: The number by the flattest plausible fit; None if that never reaches the target.
    """

    steps: int
    earliest: int
    latest: int | None

    def describe(self) -> str:
        """Format the forecast in words."""
        if self.latest is None:
            return f"about {self.steps:,} more steps (at least {self.earliest:,}; the curve sets no upper bound)"
        return f"about {self.steps:,} more steps (between {self.earliest:,} and {self.latest:,})"


@dataclass(frozen=True)
class _Fit:
    """A straight line through the logarithms of the distance to the floor, over steps or their logarithms.

    Args:
        slope: The slope of the line.
        slope_error: The standard error of the slope.
        squared_error: The mean squared error per point.
        is_power_law: True if the line is over the logarithms of the steps.
    """

    slope: float
    slope_error: float
    squared_error: float
    is_power_law: bool

    def steps(self, distance: float, at: int, num_errors: float) -> int | None:
        """Return the number of steps until the distance to the floor is reached; None if it never is.

        Args:
            distance: The logarithm of the factor by which the distance to the floor has to fall.
            at: The number of the last step.
            num_errors: The number of standard errors to add to the slope.
        """
        slope = self.slope + num_errors * self.slope_error
        if not slope < 0:
            return None
        exponent = max(distance, 0.0) / -slope
        if self.is_power_law:
            exponent = at * math.expm1(exponent) if exponent < 50 else math.inf
        return math.ceil(exponent) if exponent <= MOST_STEPS else None


def forecast(losses: Sequence[float], target: float, floor: float = 0.0) -> Forecast | None:
    """Extrapolate the distance from the floor, as an exponential and as a power of the step.

    Both are fitted to the last half, third and quarter of the curve. The interval spans all fits that are nearly as
    good as the best one, with twice their standard error.

    Args:
        losses: The finite losses of the steps.
        target: The loss to reach.
        floor: The certified floor of the loss.
    Returns:
        The forecast; None if the loss does not fall, or the target is reached or is not above the floor.
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
    """Fit a line by least squares."""
    at = at - at.mean()
    slope = float(at @ logs / (at @ at))
    residual = logs - logs.mean() - slope * at
    squares = float(residual @ residual)
    error = math.sqrt(squares / max(len(at) - 2, 1) / float(at @ at))
    return _Fit(slope, error, squares / len(at), is_power_law)
