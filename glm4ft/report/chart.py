"""Charts as inline SVG: a curve over the optimizer steps, on a logarithmic or a linear scale.

Colours and strokes are classes of the page's style sheet, so a chart adapts to light mode, dark mode and print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 640, 280
# Margins for the labels, in units of the view box; wide enough for the larger text of narrow screens.
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 16, 58
X_NAME = "optimiser step"
MAX_STRETCH = 100.0  # a line this many times below or above all values is not drawn: the curve would be flat beside it
NEGLIGIBLE = 5e-4  # nats: a bound below this keeps no loss up
MAX_POINTS = 400  # longer curves are drawn by the extremes of their stretches, so that no spike is lost
MAX_DOTS = 80


@dataclass(frozen=True)
class Line:
    """A horizontal reference line of a chart.

    Args:
        name: The label of the line.
        value: The value at which the line is drawn.
        kind: The class in the style sheet: ``goal`` for a chosen value, ``bound`` for one that no run can pass.
    """

    name: str
    value: float
    kind: str = "goal"


@dataclass(frozen=True)
class Chart:
    """One quantity over the steps.

    Args:
        name: The name of the quantity, with its unit.
        steps: The numbers of the steps, ascending.
        values: The value at each step; None if it is missing, which is marked.
        is_log: Whether the scale is logarithmic; values that are not above 0 then count as missing.
        lines: The horizontal reference lines.
        points: The steps and values of a second, sparse series.
        points_name: The name of the second series.
        caption: What is said below the chart.
        x_name: What is counted along the chart; its last word names a point.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    is_log: bool = False
    lines: Sequence[Line] = ()
    points: Sequence[tuple[int, float | None]] = ()
    points_name: str = ""
    caption: str = ""
    x_name: str = X_NAME

    @property
    def point_name(self) -> str:
        """The word before the number of a point, as in "step 3"."""
        return self.x_name.split()[-1]

    @property
    def drawn_lines(self) -> list[Line]:
        """The reference lines near enough to the values that drawing them leaves the curve its shape."""
        known = [value for value in (*self.values, *(v for _, v in self.points)) if value is not None and value > 0]
        if not self.is_log or not known:
            return list(self.lines)
        low, high = min(known) / MAX_STRETCH, max(known) * MAX_STRETCH
        return [line for line in self.lines if low <= line.value <= high]

    @property
    def note(self) -> str:
        """The caption, and the reference lines that are not drawn."""
        drawn = self.drawn_lines
        left_out = [f"The {line.name} is {_off(line.value)}." for line in self.lines if line not in drawn]
        return " ".join(filter(None, [self.caption, *left_out]))

    def describe(self) -> str:
        """Describe the curve in words, for readers who cannot see it."""
        known = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if value is not None]
        if not known:
            return f"{self.name}: no finite value"
        (first, begin), (last, end) = known[0], known[-1]
        text = f"{self.name}: {begin:.4g} at {self.point_name} {first}, {end:.4g} at {self.point_name} {last}"
        low, high = min(value for _, value in known), max(value for _, value in known)
        if low == high:
            return f"{self.name}: {low:.4g} throughout"
        text += f", between {low:.4g} and {high:.4g}" if len(known) > 2 else ""
        missing = [step for step, value in zip(self.steps, self.values, strict=True) if value is None]
        return text + (f"; not finite at {self.point_name} {missing[0]}" if missing else "")

    def svg(self) -> Markup:
        """Draw the chart as an ``svg`` element."""
        return Markup("").join([_open(self), *_grid(self, scale := _Scale.of(self)), *_curve(self, scale), _CLOSE])


_CLOSE = Markup("</svg>")


@dataclass(frozen=True)
class _Scale:
    """Maps steps and values to coordinates of the view box."""

    first: int
    last: int
    low: float
    high: float
    is_log: bool

    @classmethod
    def of(cls, chart: Chart) -> _Scale:
        values = [*chart.values, *(value for _, value in chart.points), *(line.value for line in chart.drawn_lines)]
        known = [v for v in values if v is not None and (v > 0 or not chart.is_log)]
        low, high = min(known, default=0.1 if chart.is_log else 0.0), max(known, default=1.0)
        if chart.is_log:
            low, high = low / 1.2, high * 1.2
        else:
            low, high = min(low, 0.0), high * 1.05 or 1.0
        return cls(min(chart.steps, default=0), max(chart.steps, default=1), low, high, chart.is_log)

    def x(self, step: int) -> float:
        share = (step - self.first) / max(self.last - self.first, 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        if self.is_log:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.is_log else _linear_ticks(self.low, self.high)

    def step_ticks(self) -> list[int]:
        return sorted({*(int(t) for t in _linear_ticks(self.first, self.last) if t >= self.first), self.first})


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sparse = decades[:: math.ceil(len(decades) / 6)]
    for mantissas, candidates in (((1,), sparse), ((1, 3), decades), ((1, 2, 5), decades)):
        ticks = [m * 10.0**d for d in candidates for m in mantissas if low <= m * 10.0**d <= high]
        if len(ticks) >= 3:
            return ticks
    return ticks or [low, high]


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = max(high - low, 1e-30) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _open(chart: Chart) -> Markup:
    opening = '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-label="{label}">'
    return Markup(opening).format(w=WIDTH, h=HEIGHT, label=chart.describe())


def _grid(chart: Chart, scale: _Scale) -> list[Markup]:
    line = Markup('<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>')
    label = Markup('<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>')
    right, bottom, parts = WIDTH - RIGHT, HEIGHT - BOTTOM, []
    for value in scale.ticks():
        y = scale.y(value)
        parts += [line.format(kind="grid", x1=LEFT, x2=right, y1=y, y2=y)]
        parts += [label.format(kind="tick y", x=LEFT - 8, y=y + 5, text=f"{value:.3g}")]
    for step in scale.step_ticks():
        parts += [label.format(kind="tick x", x=scale.x(step), y=bottom + 22, text=f"{step:,}")]
    parts += [label.format(kind="tick x name", x=(LEFT + right) / 2, y=HEIGHT - 6, text=chart.x_name)]
    parts += [line.format(kind="axis", x1=LEFT, x2=right, y1=bottom, y2=bottom)]
    for reference in (line for line in chart.drawn_lines if line.value > 0 or not scale.is_log):
        y = scale.y(reference.value)
        parts += [line.format(kind=f"line {reference.kind}", x1=LEFT, x2=right, y1=y, y2=y)]
        side, x = ("right", right - 2) if _is_clear_at_the_end(chart, reference, scale) else ("left", LEFT + 4)
        text = f"{reference.name} {reference.value:.3g}"
        parts += [label.format(kind=f"name {side} {reference.kind}", x=x, y=y - 5, text=text)]
    return parts


def _is_clear_at_the_end(chart: Chart, line: Line, scale: _Scale) -> bool:
    """Whether the curve's end is at least as far from the line as its start, so that the label fits at the end."""
    known = [value for value in chart.values if value is not None and (value > 0 or not scale.is_log)]
    return not known or abs(scale.y(known[-1]) - scale.y(line.value)) >= abs(scale.y(known[0]) - scale.y(line.value))


def _curve(chart: Chart, scale: _Scale) -> list[Markup]:
    points = [(s, v if v is not None and (v > 0 or not scale.is_log) else None) for s, v in _series(chart)]
    parts, stretch = [], list[tuple[int, float]]()
    for step, value in [*points, (0, None)]:
        if value is not None:
            stretch.append((step, value))
            continue
        if stretch:
            path = " ".join(f"{scale.x(s):.1f},{scale.y(v):.1f}" for s, v in stretch)
            parts.append(Markup('<polyline class="curve" points="{}"/>').format(path))
        stretch = []
    parts += [_missing(chart.point_name, scale, step) for step, value in points if value is None]
    few = len(points) <= MAX_DOTS
    kind = "dot" if few else "hover"
    parts += [_dot(kind, scale, s, v, f"{chart.point_name} {s:,}: {chart.name}") for s, v in points if v is not None]
    sparse = [(s, v) for s, v in chart.points if v is not None and (v > 0 or not scale.is_log)]
    return parts + [_dot("point", scale, s, v, f"{chart.point_name} {s:,}: {chart.points_name}") for s, v in sparse]


def _series(chart: Chart) -> list[tuple[int, float | None]]:
    """Return all points of a short curve; otherwise the lowest, highest and missing points of each stretch."""
    points = list(zip(chart.steps, chart.values, strict=True))
    if len(points) <= MAX_POINTS:
        return points
    size, kept = math.ceil(2 * len(points) / MAX_POINTS), list[tuple[int, float | None]]()
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        known = [point for point in stretch if point[1] is not None]
        extremes = {min(known, key=_value), max(known, key=_value)} if known else set()
        kept += sorted(extremes | {point for point in stretch if point[1] is None}, key=lambda point: point[0])
    return kept


def _value(point: tuple[int, float | None]) -> float:
    return math.nan if point[1] is None else point[1]


def _dot(kind: str, scale: _Scale, step: int, value: float, name: str) -> Markup:
    dot = Markup('<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"><title>{text}</title></circle>')
    radius = {"dot": 2.5, "hover": 5, "point": 4}[kind]
    return dot.format(kind=kind, x=scale.x(step), y=scale.y(value), r=radius, text=f"{name} {value:.5g}")


def _missing(name: str, scale: _Scale, step: int) -> Markup:
    cross = Markup('<text class="missing" x="{x:.1f}" y="{y}">✕<title>{name} {step}: not finite</title></text>')
    return cross.format(x=scale.x(step), y=TOP + 8, name=name, step=step)


def _off(value: float) -> str:
    """Where a line is that is not drawn; what no loss is ever read to counts as 0."""
    return f"{value:.2g}, off the chart" if value >= NEGLIGIBLE else "practically 0"
