"""A curve in a line of text shows its ends, its shape and every spike.

Run: pytest tests/report/test_sparkline.py
"""

from __future__ import annotations

import math

from glm4ft.report.sparkline import BARS, MISSING, sparkline


def test_ends_are_numbers_and_the_shape_is_between_them() -> None:
    assert sparkline([1.0, 10.0, 100.0]) == "1 ▁▅█ 100"


def test_a_curve_that_passes_zero_has_a_linear_scale() -> None:
    assert sparkline([-1.0, 0.0, 1.0]) == "-1 ▁▅█ 1"


def test_a_flat_curve_is_flat() -> None:
    assert sparkline([2.0, 2.0]) == "2 ▁▁ 2"


def test_no_spike_is_lost_in_a_long_curve() -> None:
    values = [1.0] * 1000
    values[377] = 50.0
    bars = sparkline(values, width=40).split(" ")[1]
    assert len(bars) == 40
    assert bars.count(BARS[-1]) == 1


def test_what_is_not_finite_is_a_cross_even_among_many() -> None:
    assert sparkline([2.0, None, math.inf]) == f"2 ▁{MISSING}{MISSING} {MISSING}"
    assert sparkline([1.0] * 50 + [math.nan] + [1.0] * 50, width=10).count(MISSING) == 1


def test_an_empty_curve_is_an_empty_text() -> None:
    assert sparkline([]) == ""
