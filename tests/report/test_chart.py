"""Charts name their axes and points, keep the shape of the curve, and say below what the eye does not see.

Run: pytest tests/report/test_chart.py
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from report_samples import founding_bug

from glm4ft.report.captions import loss_caption, norm_caption, rate_caption
from glm4ft.report.chart import HEIGHT, WIDTH, Chart, Line
from glm4ft.report.content import Curves
from glm4ft.report.html_page import LONG_TEXT, charts_of, render_page

FALLING = [8.0, 4.0, 1.0, 0.5]
STEPS = [1, 2, 3, 4]
CURVES = Curves(
    steps=(1, 2, 3, 4, 5),
    loss=(9.0, 2.0, 1.0, 0.5, 0.4),
    grad_norm=(1.0, 3.0, None, 0.5, 0.5),
    rate=(1e-4, 2e-4, 2e-4, 1e-4, 0.5e-4),
    evaluations=((2, 3.0), (4, 3.5)),
    floor=1e-8,
    clip=0.75,
)


def heights(chart: Chart) -> list[float]:
    """Where the curve's points are drawn, from 0 at the bottom of the picture to 1 at its top."""
    (points,) = re.findall(r'class="curve" points="([^"]+)"', chart.svg())
    return [1 - float(point.partition(",")[2]) / HEIGHT for point in points.split(" ")]


@pytest.mark.parametrize(("value", "told"), [(1e-8, "practically 0"), (1e6, "1e+06, off the chart")])
def test_a_line_far_off_leaves_the_curve_its_shape_and_is_told(value: float, told: str) -> None:
    alone, beside = (Chart("loss", STEPS, FALLING, True, lines) for lines in ([], [Line("floor", value, "bound")]))
    assert heights(beside) == heights(alone)
    assert f"The floor is {told}." in beside.note
    assert "floor" not in beside.svg()


def test_a_line_near_the_values_is_drawn() -> None:
    chart = Chart("loss", STEPS, FALLING, True, [Line("target", 0.01)])
    assert "target 0.01" in chart.svg()
    assert "off the chart" not in chart.note
    assert max(heights(chart)) - min(heights(chart)) > 0.25  # of the picture is left to the curve


def test_every_chart_names_its_steps_within_the_picture() -> None:
    for chart in charts_of(CURVES):
        (x, y) = re.findall(r'class="tick x name" x="([\d.]+)" y="([\d.]+)">optimiser step<', chart.svg())[0]
        assert 0 < float(x) < WIDTH
        assert 0 < float(y) < HEIGHT


def test_evaluation_points_have_a_legend_where_there_are_some() -> None:
    content = founding_bug()
    assert "held-out loss" not in render_page(content)
    page = render_page(replace(content, curves=replace(content.curves, evaluations=((10, 3.0),))))
    assert page.count('<span class="point"></span> held-out loss') == 1


def test_captions_say_what_the_curves_do_not() -> None:
    assert loss_caption(CURVES) == (
        "From 9 at step 1 to 0.4 at step 5, 90% of the fall by step 3. On held-out conversations lowest at step 2, 3, "
        "and 3.5 at the last one."
    )
    assert norm_caption(CURVES) == (
        "Largest 3 at step 2, median 0.75. Scaled down to 0.75 in 2 of 4 steps. Not finite in 1 of 5 steps, first at "
        "step 3."
    )
    assert rate_caption(CURVES) == "Rises until step 2, to 0.0002; 25% of that at the end."
    assert rate_caption(replace(CURVES, rate=(1e-4,) * 5)) == "0.0001 from the first step on, and stays there."
    assert "Scaled" not in norm_caption(replace(CURVES, clip=None))
    assert loss_caption(replace(CURVES, loss=(None,) * 5)) == "No finite loss."


def test_long_facts_are_folded_and_short_ones_are_not() -> None:
    content = founding_bug()
    raw = "rows from line(s) " + ", ".join(map(str, range(200)))
    headline = replace(content.headline, happened=("Short.", raw))
    page = render_page(replace(content, headline=headline))
    assert page.count('<details class="long">') == 1
    shown = page[page.index('<details class="long">') :]
    assert len(shown[: shown.index("</summary>")]) < LONG_TEXT
    assert "199</details>" in page
