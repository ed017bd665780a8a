"""How many more steps a falling loss needs: an extrapolation, with an interval that says how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_STEPS = 100_000
_LEAST_POINTS = 6


@dataclass(frozen=True)
class Forecast:
    """When a target loss will be reached if the curve goes on as it went.

    Args:
        steps: further steps, by the best fit.
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


def forecast(losses: Sequence[float], target: float, floor: float = 0.0) -> Forecast | None:
    """Extrapolate the distance from the floor as an exponential.

    The distance falls by a constant factor a step where a curve is well into its descent; how constant, the curve says
    itself: the factor is fitted to the last half, third and quarter of it, and the interval spans all fits with twice
    their standard error.

    Args:
        losses: of the steps, finite.
        target: loss to reach.
        floor: certified floor of the loss.
    Returns:
        The forecast; None if the loss does not fall, the target is reached, or is not above the floor.
    """
    distances = np.array([loss - floor for loss in losses], dtype=np.float64)
    if len(distances) < _LEAST_POINTS or not target > floor or not losses[-1] > target:
        return None
    fits = [_fit(distances[-max(_LEAST_POINTS, len(distances) // part) :]) for part in (2, 3, 4)]
    if any(fit is None for fit in fits):
        return None
    slopes = [fit for fit in fits if fit is not None]
    best = slopes[0][0]
    steepest, flattest = min(s - 2 * e for s, e in slopes), max(s + 2 * e for s, e in slopes)
    if not best < 0:
        return None
    distance = math.log(float(np.median(distances[-3:])) / (target - floor))
    latest = _steps(distance, flattest)
    steps = _steps(distance, best)
    return None if steps is None else Forecast(steps, _steps(distance, steepest) or 1, latest)


def _steps(distance: float, slope: float) -> int | None:
    if not slope < 0:
        return None
    steps = math.ceil(max(distance, 0.0) / -slope)
    return steps if steps <= MOST_STEPS else None


def _fit(distances: np.ndarray) -> tuple[float, float] | None:
    """Slope of the logarithm per step by least squares, and its standard error; None if the floor is undercut."""
    if not (distances > 0).all():
        return None
    at = np.arange(len(distances), dtype=np.float64)
    at -= at.mean()
    logs = np.log(distances)
    slope = float(at @ logs / (at @ at))
    residual = logs - logs.mean() - slope * at
    return slope, math.sqrt(float(residual @ residual) / max(len(at) - 2, 1) / float(at @ at))
