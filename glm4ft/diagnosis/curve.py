"""Statistics of a logged curve that rules compare with their predictions: noise, level, trend, and the point of a jump.

A log is noisy: each point is the loss of other rows. So each statement about a level or a trend carries the noise that
the log itself shows.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm4ft.diagnosis.evidence import CurvePoint

LEAST_STEPS = 8  # the fewest points from which a curve is judged
# The median size of the difference of two points that each have noise of standard deviation 1.
_MEDIAN_DIFFERENCE = 0.6745 * math.sqrt(2)
_MOST_WINDOW = 20
# A jump is larger than the noise by this factor, and than the level before it by this share.
_CLEAR, _LARGE = 6.0, 0.15


def noise(losses: Sequence[float]) -> float:
    """The standard deviation of the differences between a curve and its trend, robust against single spikes."""
    if len(losses) < 2:
        return 0.0
    return statistics.median(abs(b - a) for a, b in itertools.pairwise(losses)) / _MEDIAN_DIFFERENCE


@dataclass(frozen=True)
class Trend:
    """A straight line through a part of a curve.

    Args:
        change: The change of the loss over the part, in nats; negative if it falls.
        error: The standard error of the change.
    """

    change: float
    error: float

    @property
    def is_falling(self) -> bool:
        """Whether the fall is more than chance: three standard errors."""
        return self.change < -3 * self.error


def trend(losses: Sequence[float]) -> Trend:
    """Fit a line by least squares to at least three losses."""
    at = np.arange(len(losses), dtype=np.float64)
    at -= at.mean()
    values = np.asarray(losses, dtype=np.float64)
    slope = float(at @ values / (at @ at))
    residual = values - values.mean() - slope * at
    error = math.sqrt(float(residual @ residual) / max(len(losses) - 2, 1) / float(at @ at))
    length = len(losses) - 1
    return Trend(slope * length, error * length)


def interval(curve: Sequence[CurvePoint]) -> int:
    """The number of steps from one logged point to the next."""
    gaps = [b.step - a.step for a, b in itertools.pairwise(curve)]
    return max(1, int(statistics.median(gaps))) if gaps else max(1, curve[0].step if curve else 1)


def sum_of_rates(curve: Sequence[CurvePoint]) -> float | None:
    """The sum of the learning rates over all steps; None if they were not logged.

    AdamW moves a weight by about one learning rate in each step, and by not much more, whatever the gradient. So no
    weight has moved further than this sum.
    """
    rates = [point.lr for point in curve if point.lr is not None]
    return sum(rates) * interval(curve) if rates else None


def peak_rate(curve: Sequence[CurvePoint]) -> float:
    """The largest learning rate; 0 if none was logged."""
    return max((point.lr for point in curve if point.lr is not None), default=0.0)


@dataclass(frozen=True)
class Jump:
    """A rise of the loss from one logged point to the next that stays.

    Args:
        at: The index of the first point after it.
        before: The level before it: the median of the last losses.
        after: The level after it.
        later: The level a window later.
    """

    at: int
    before: float
    after: float
    later: float


def find_jump(losses: Sequence[float]) -> Jump | None:
    """Find the largest rise within a single step, between two parts without one, that does not go away at once."""
    window = min(_MOST_WINDOW, len(losses) // 3)
    if window < 3:
        return None
    found = [jump for at in range(window, len(losses) - 2) if (jump := _jump(losses, at, window)) is not None]
    return max(found, key=lambda jump: jump.after - jump.before, default=None)


def _jump(losses: Sequence[float], at: int, window: int) -> Jump | None:
    before, after = losses[at - window : at], losses[at : at + window]
    low, high = statistics.median(before[-5:]), statistics.median(after[:3])
    rise = high - low
    if not rise > max(_CLEAR * noise(before), _CLEAR * noise(after), _LARGE * low):
        return None
    # within one step: the last point before is at the lower level, the first one after at the higher
    is_sharp = losses[at - 1] < low + 0.3 * rise and losses[at] > low + 0.6 * rise
    is_level = max(before[-5:]) < low + 0.5 * rise
    stays = all(loss > low + 0.3 * rise for loss in after[:3])
    return Jump(at, low, high, statistics.median(after[-3:])) if is_sharp and is_level and stays else None
