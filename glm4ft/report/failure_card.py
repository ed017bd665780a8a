"""The card of a failed run: what went wrong on one screen, with the command that shows it again."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

from glm4ft.report.content import Content, ShownTurn
from glm4ft.report.costly_tokens import PART_NAMES, costly_tokens
from glm4ft.report.sparkline import sparkline
from glm4ft.text.safe_text import visible

MAX_LINES = 40
WIDTH = 110
INDENT = 11
SHOWN = 4  # rows, parts and tokens of each kind
SHOWN_TURNS = 2
BEFORE, AFTER = 24, 40  # characters shown around the first difference
TONES = {"good": "LEARNT", "bad": "FAILED", "unsure": "UNSURE"}


def explain_failure(content: Content) -> str:
    """The card, at most ``MAX_LINES`` lines; no line starts with text from the data.

    Args:
        content: What the report of the run shows.
    Returns:
        Text for a terminal or a log.
    """
    sections = (_verdict, _curves, _targets, _tokens, _turns, _facts, _command)
    lines = [line for section in sections for line in section(content)]
    if len(lines) > MAX_LINES:
        command = lines[-1]
        lines = [
            *lines[: MAX_LINES - 2],
            f"{'':{INDENT}}│ {len(lines) - MAX_LINES + 1} more lines are left out",
            command,
        ]
    return "\n".join(lines)


def _labelled(label: str, texts: Sequence[str]) -> Iterator[str]:
    """Each text on its own line, the label before the first, wrapped behind a rule."""
    for text in texts:
        shown = visible(text, newlines=False)
        pieces = textwrap.wrap(shown, WIDTH - INDENT - 2, break_on_hyphens=False) or [""]
        for piece in pieces:
            yield f"{label:<{INDENT}}│ {piece}"
            label = ""


def _verdict(content: Content) -> Iterator[str]:
    headline = content.headline
    yield from _labelled(TONES[headline.tone], [content.title, headline.text])
    yield from _labelled("because", list(itertools.islice(headline.happened, SHOWN)))
    yield from _labelled("to do", headline.remedies[:2])


def _curves(content: Content) -> Iterator[str]:
    curves = content.curves
    if curves.steps:
        marks = [f"{name} {value:.4g}" for name, value in (("target", curves.target), ("certified floor", curves.floor))
                 if value is not None]  # fmt: skip
        yield from _labelled("loss", [f"{sparkline(curves.loss)}  {', '.join([f'{len(curves.steps)} steps', *marks])}"])
        norms = [norm for norm in curves.grad_norm if norm is not None and math.isfinite(norm)]
        if norms:
            at = curves.steps[curves.grad_norm.index(max(norms))]
            lost = len(curves.grad_norm) - len(norms)
            told = f"largest {max(norms):.3g} at step {at}, median {statistics.median(norms):.3g}, {lost} not finite"
            yield from _labelled("grad norm", [f"{sparkline(curves.grad_norm)}  {told}"])
        if any(rate is not None for rate in curves.rate):
            yield from _labelled("rate", [sparkline(curves.rate)])
    if curves.floor is not None:
        reach = (
            ""
            if curves.target is None
            else "; the target is " + ("below it" if curves.target <= curves.floor else "above it")
        )
        yield from _labelled("floor", [f"no adapter below the frozen head gets under {curves.floor:.4f}{reach}"])


def _targets(content: Content) -> Iterator[str]:
    told = []
    for row in content.rows[:SHOWN]:
        loss = "" if row.mean_loss is None else f", mean loss {row.mean_loss:.4f}"
        told.append(f"{row.title}: {len(row.targets):,} of {len(row.input_ids):,} tokens{loss}")
    if content.num_rows > len(told):
        told.append(f"and {content.num_rows - len(told):,} more")
    yield from _labelled("targets", told)
    wrong = [
        f"{PART_NAMES.get(part, part)}: {supervised:,} of {tokens:,} supervised, should be {should:,}"
        for part, (tokens, supervised, should) in content.counts.items()
        if should is not None and should != supervised
    ]
    yield from _labelled("mask", wrong[:SHOWN])


def _tokens(content: Content) -> Iterator[str]:
    costly = costly_tokens(content.rows, content.tokenizer, limit=SHOWN) if content.rows else []
    for number, token in enumerate(costly):
        figures = [f"{token.count:,} times", f"loss {token.loss:.3g}"]
        figures += [f"floor {token.floor:.3g}"] if token.floor is not None else []
        figures += [f"the model says {token.said}"] if token.said else []
        # the texts are visible already, and none stands at the start of a line
        text = f"{token.share:>4.0%} {token.text} ({token.part}): {', '.join(figures)}"
        yield f"{'' if number else 'tokens':<{INDENT}}│ {text}"


def _turns(content: Content) -> Iterator[str]:
    tried = [turn for turn in content.turns if turn.trained]
    wrong = [turn for turn in tried if not turn.exact]
    if tried:
        yield from _labelled("round trip", [f"{len(tried) - len(wrong)} of {len(tried)} turns came back exactly"])
    for turn in wrong[:SHOWN_TURNS]:
        stop = f"stopped on {turn.stop}" if turn.stop else "did not stop"
        yield from _labelled("", [f"{turn.title}, {stop}"])
        yield from explain_difference(turn)


def explain_difference(turn: ShownTurn) -> Iterator[str]:
    """What was trained above what was said, and a caret under the first character that differs."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(turn.expected, turn.generated, strict=False))
    same = sum(1 for _ in pairs)
    start = max(0, same - BEFORE)
    lead = ("…" if start else "") + visible(turn.expected[start:same], newlines=False)
    for label, text in (("trained", turn.expected), ("said", turn.generated)):
        rest = visible(text[same : same + AFTER], newlines=False) + ("…" if len(text) > same + AFTER else "")
        yield f"{label:>{INDENT - 1}} │ {lead}{rest}"
    yield f"{'':{INDENT}}│ {' ' * cell_len(lead)}^"


def _facts(content: Content) -> Iterator[str]:
    yield from _labelled("adapter", [value for name, value in content.facts if name == "adapter"])


def _command(content: Content) -> Iterator[str]:
    if content.command:
        yield f"{'reproduce':<{INDENT}}│ {visible(content.command, newlines=False)}"
