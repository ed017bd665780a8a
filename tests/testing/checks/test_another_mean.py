"""A reported loss that is not the mean over all supervised tokens is recognised as the mean that it is.

Run: pytest tests/testing/checks/test_another_mean.py
"""

from __future__ import annotations

import pytest

from glm4ft.testing.checks.another_mean import explain_mean

SUMS, COUNTS = (3.0, 20.0, 2.5, 40.0, 7.0), (2, 9, 5, 11, 3)  # five rows of unlike length and loss
LIMIT = 1e-4


@pytest.mark.parametrize(
    ("reported", "what"),
    [
        ((3 / 2 + 20 / 9 + 2.5 / 5 + 40 / 11 + 7 / 3) / 5, "the rows' means are averaged"),
        ((23 / 11 + 42.5 / 16 + 7 / 3) / 3, "the means of batches of 2 rows are averaged"),
        ((72.5 + 3.0) / (30 + 2), "the first 1 count twice"),
        ((72.5 + 23.0) / (30 + 11), "the first 2 count twice"),
        (65.5 / 27, "the last 1 are left out"),
    ],
)
def test_mean_is_named(reported: float, what: str) -> None:
    assert explain_mean(reported, SUMS, COUNTS, LIMIT).startswith(what)


@pytest.mark.parametrize("reported", [72.5 / 30 * 1.5, 0.0, float("nan"), float("inf")])
def test_figure_that_is_no_such_mean_has_no_name(reported: float) -> None:
    assert explain_mean(reported, SUMS, COUNTS, LIMIT) == ""


def test_rows_without_targets_are_in_no_mean() -> None:
    assert explain_mean((3 / 2 + 8 / 4) / 2, (3.0, 0.0, 8.0), (2, 0, 4), LIMIT).startswith("the rows' means")
