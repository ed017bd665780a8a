"""What the page of figures says is computed as it says: intervals, and which faults change the optimisation.

Run: pytest tests/testing/baseline/test_figures.py
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "sweeps"))
from baseline_page import BEGIN, END, changes_the_optimisation, interval, write_figures


@pytest.mark.parametrize(
    ("alarms", "count", "low", "high"),
    # by the quantiles of the beta distribution, as published tables have them
    [(0, 400, 0.0, 0.00918), (3, 400, 0.00155, 0.02176), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0)],
)
def test_the_interval_is_that_of_clopper_and_pearson(alarms: int, count: int, low: float, high: float) -> None:
    assert interval(alarms, count) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("distances", "changes"),
    [([0.0, 0.0], False), ([0.0, 1e-3], True), ([1e-5], False), ([math.inf], True), ([math.nan], True)],
)
def test_a_fault_changes_the_optimisation_if_its_parameters_end_elsewhere(
    distances: list[float], changes: bool
) -> None:
    """Whatever the comparison says of it."""
    for is_alarm in (True, False):
        runs = [{"distance": distance, "is_alarm": is_alarm} for distance in distances]
        assert changes_the_optimisation({"runs": runs}, farthest=1e-4) == changes


def test_a_page_without_a_place_for_the_figures_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{END}\n{BEGIN}\n", "utf-8")
    with pytest.raises(ValueError, match="does not have"):
        write_figures(page, [])
