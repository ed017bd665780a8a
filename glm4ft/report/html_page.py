"""Renders the report as one HTML file without scripts and network access; its security policy forbids both."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import glm4ft
from glm4ft.report.captions import loss_caption, norm_caption, rate_caption
from glm4ft.report.chart import Chart, Line
from glm4ft.report.content import STATUSES, Content, Curves, ShownCheck, ShownRow, ShownTurn
from glm4ft.report.costly_tokens import PART_NAMES, costly_tokens
from glm4ft.report.heat_map import LEVEL_NAMES, LEVELS, listed_tokens, stretches
from glm4ft.text.safe_text import visible

OPEN_TOKENS = 2000  # conversations are unfolded until this many tokens are on the page
EVALUATION = "held-out loss"
LONG_TEXT = 240  # characters after which a text is folded
TONE_NAMES = {"good": "Right", "bad": "Wrong", "unsure": "Unsure"}


def render_page(content: Content) -> str:
    """Render the report as HTML.

    Args:
        content: The content of the report; its texts are made visible and escaped here.
    Returns:
        A complete document. Its content security policy allows its own style sheet, by digest, and nothing else.
    """
    rows = list(_rows(content))
    style, digest = style_and_digest()
    return environment().get_template("page.html").render(
        content=content,
        style=style,
        style_sha256=digest,
        version=glm4ft.__version__,
        tone_names=TONE_NAMES,
        part_names=PART_NAMES,
        level_names=LEVEL_NAMES,
        level_ranges=_level_ranges(),
        charts=charts_of(content.curves),
        runs=[(name, charts_of(curves)) for name, curves in content.runs],
        stages=list(_stages(content.checks)),
        costly=costly_tokens(content.rows, content.tokenizer) if content.rows else [],
        rows=rows,
        turns=[_turn(turn) for turn in content.turns],
        has_losses=any(row.losses for row in content.rows),
        long_text=LONG_TEXT,
        has_floors=any(row.floors for row in content.rows),
    )  # fmt: skip


def charts_of(curves: Curves) -> list[Chart]:
    """Make charts of loss, gradient norm and learning rate, as far as they were recorded."""
    wanted = (Line("target", curves.target or 0.0), Line("certified floor", curves.floor or 0.0, "bound"))
    lines = [line for line in wanted if line.value > 0]
    clip = [Line("clipped to", curves.clip)] if curves.clip else []
    steps, points = curves.steps, curves.evaluations
    captions = loss_caption(curves), norm_caption(curves), rate_caption(curves)
    charts = [
        Chart("loss, nats per supervised token", steps, curves.loss, True, lines, points, EVALUATION, captions[0]),
        Chart("gradient norm before clipping", steps, curves.grad_norm, True, clip, caption=captions[1]),
        Chart("learning rate", steps, curves.rate, caption=captions[2]),
    ]
    return [chart for chart in charts if any(value is not None for value in chart.values)]


def _rows(content: Content) -> Iterator[dict[str, Any]]:
    so_far = 0
    for row in content.rows:
        so_far += len(row.input_ids)
        yield {
            "title": row.title,
            "summary": _summary(row),
            "is_open": so_far <= OPEN_TOKENS or row is content.rows[0],
            "stretches": stretches(row, content.tokenizer),
            "listed": listed_tokens(row, content.tokenizer),
        }


def _summary(row: ShownRow) -> str:
    text = f"{len(row.input_ids):,} tokens, {len(row.targets):,} supervised"
    return text if row.mean_loss is None else f"{text}, mean loss {row.mean_loss:.4f}"


def _turn(turn: ShownTurn) -> dict[str, Any]:
    """Describe a turn for the template, with the common beginning of both texts separate from the rest."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(turn.expected, turn.generated, strict=False))
    same = sum(1 for _ in pairs)
    stop = f"stopped on {turn.stop}" if turn.stop else "did not stop"
    kind = "exact" if turn.exact else "differs" if turn.trained else "differs, not trained"
    return {
        "title": turn.title,
        "exact": turn.exact or not turn.trained,
        "verdict": f"{'✓' if turn.exact else '✗'} {kind}, {stop}",
        "generated": visible(turn.generated, newlines=False),
        "same": visible(turn.expected[:same], newlines=False),
        "expected_rest": visible(turn.expected[same:], newlines=False),
        "generated_rest": visible(turn.generated[same:], newlines=False) or "(nothing)",
    }


def _stages(checks: tuple[ShownCheck, ...]) -> Iterator[dict[str, Any]]:
    for name, group in itertools.groupby(checks, key=lambda check: check.stage):
        mine = list(group)
        counts = [(status, sum(check.status == status for check in mine)) for status in STATUSES]
        yield {
            "name": name,
            "status": next(status for status, count in counts if count),
            "summary": ", ".join(f"{count} {status.replace('-', ' ')}" for status, count in counts if count),
            "told": [check for check in mine if check.status != "passed"],
            "quiet": [check for check in mine if check.status == "passed"],
        }


def _level_ranges() -> list[str]:
    ends = ["0", *(f"{end:g}" for end in LEVELS)]
    return [*(f"{low} to {high}" for low, high in itertools.pairwise(ends)), f"{ends[-1]} nats and more"]


@functools.cache
def style_and_digest() -> tuple[Markup, str]:
    """The style sheet, and its digest for the security policy.

    The sheet is ours, so it needs no escaping, which would change the digest.
    """
    style = Markup((Path(__file__).parent / "page" / "page.css").read_text("utf-8"))
    return style, base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


@functools.cache
def environment() -> Environment:
    """The environment of the page's templates, which escapes all text."""
    found = Environment(
        loader=PackageLoader("glm4ft.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["shown"] = lambda text: visible(str(text), newlines=False)
    found.filters["shown_lines"] = lambda text: "\n".join(visible(s, newlines=False) for s in text.split("\n"))
    return found
