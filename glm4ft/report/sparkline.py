"""Draws a curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
MISSING = "×"


def sparkline(values: Sequence[float | None], *, width: int = 40) -> str:
    """Draw a curve between its first and its last value.

    Args:
        values: The value of each step; None and non-finite values are drawn as ``×``. If all values are positive the
            scale is logarithmic, since a loss that falls to 0.01 is flat on a linear one after ten steps.
        width: The largest number of characters; each shows the highest value of its steps, so that no spike is lost.
    Returns:
        The first value, the curve and the last value, as in ``8.41 █▅▂▁ 0.0081``; "" for an empty curve.
    """
    if not values:
        return ""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    scaled = [_scale(value, is_log=min(finite, default=0.0) > 0) for value in values]
    size = math.ceil(len(values) / width)
    cells = [_highest(scaled[start : start + size]) for start in range(0, len(scaled), size)]
    low = min((cell for cell in cells if cell is not None), default=0.0)
    high = max((cell for cell in cells if cell is not None), default=0.0)
    bars = "".join(MISSING if cell is None else _bar(cell, low, high) for cell in cells)
    return f"{_number(values[0])} {bars} {_number(values[-1])}"


def _scale(value: float | None, *, is_log: bool) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return math.log(value) if is_log else value


def _highest(cells: Sequence[float | None]) -> float | None:
    """Return the highest value; None if any is None, so that a non-finite value stays visible."""
    return None if None in cells else max(cell for cell in cells if cell is not None)


def _bar(cell: float, low: float, high: float) -> str:
    share = (cell - low) / (high - low) if high > low else 0.0
    return BARS[min(int(share * len(BARS)), len(BARS) - 1)]


def _number(value: float | None) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{value:.3g}"
