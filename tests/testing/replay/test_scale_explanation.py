"""The adapter's scale explains a wrong gradient while B is zero, but never a wrong loss.

Run: pytest tests/testing/replay/test_scale_explanation.py
"""

from __future__ import annotations

import pytest

from glm4ft.testing.replay.departure import Departure
from glm4ft.testing.replay.replay import Verdict, _explain_by_scale


@pytest.mark.parametrize(("hides", "left"), [((), ["model"]), (("gradient",), ["gradient", "model"])])
def test_a_loss_that_departs_is_not_explained_by_the_scale(hides: tuple[str, ...], left: list[str]) -> None:
    gradient = Departure("gradient", 1, "tokens count 4 times", factor=4.0, hides=hides)
    verdict = Verdict({"gradient": gradient, "model": Departure("model", 2, "the output is off", size=0.3)})

    _explain_by_scale(verdict, first_moved=2)

    assert list(verdict.departures) == left
    assert ("scale" in verdict.departures["model"].cause) == (not hides)
