"""Renders the report in Markdown, for the job page of a CI system. No line starts with external text."""

from __future__ import annotations

from collections.abc import Iterator

from glm4ft.report.content import Content, ShownCheck
from glm4ft.report.costly_tokens import PART_NAMES, costly_tokens
from glm4ft.report.sparkline import sparkline
from glm4ft.text.markdown_text import code, prose

TONES = {"good": "✅", "bad": "❌", "unsure": "⚠️"}
MARKS = {"passed": "✅", "failed": "❌", "error": "❌", "skipped": "➖", "expected-failure": "⚠️"}


def render_summary(content: Content) -> str:
    """Render the report as GitHub-flavoured Markdown, short enough for a job page."""
    parts = (_headline, _curves, _runs, _counts, _tokens, _checks, _turns, _footer)
    return "\n".join(line for part in parts for line in part(content)) + "\n"


def _headline(content: Content) -> Iterator[str]:
    headline = content.headline
    yield f"### {TONES[headline.tone]} {prose(headline.text)}"
    yield f"\n*{prose(content.title)}*\n"
    if headline.supervised:
        yield f"- **supervised:** {prose(headline.supervised)}"
    yield from (f"- {prose(text)}" for text in headline.happened)
    yield from (f"- **to do:** {prose(text)}" for text in headline.remedies)


def _curves(content: Content) -> Iterator[str]:
    curves = content.curves
    for name, values in (("loss", curves.loss), ("gradient norm", curves.grad_norm)):
        if any(value is not None for value in values):
            yield f"- {name}: {code(sparkline(values))} over {len(values):,} steps"
    for name, value in (("target", curves.target), ("certified floor", curves.floor)):
        if value is not None:
            yield f"- {name}: {value:.4g}"


def _runs(content: Content) -> Iterator[str]:
    for name, curves in content.runs:
        yield f"- {code(name)}: loss {code(sparkline(curves.loss))} over {len(curves.loss):,} steps"


def _counts(content: Content) -> Iterator[str]:
    if content.counts:
        yield "\n| tokens of | all | supervised | should be |\n|---|---:|---:|---:|"
    for part, (tokens, supervised, should) in content.counts.items():
        is_wrong = should is not None and should != supervised
        right = "–" if should is None else f"{should:,}"
        yield f"| {prose(PART_NAMES.get(part, part))} | {tokens:,} | {supervised:,} | {right}{' ❌' * is_wrong} |"


def _tokens(content: Content) -> Iterator[str]:
    costly = costly_tokens(content.rows, content.tokenizer, limit=5) if content.rows else []
    if costly:
        yield "\n| token | part | times | loss | share of all | floor |\n|---|---|---:|---:|---:|---:|"
    for token in costly:
        floor = "–" if token.floor is None else f"{token.floor:.3g}"
        row = (f"{token.count:,}", f"{token.loss:.3g}", f"{token.share:.0%}", floor)
        yield f"| {code(token.text, in_table=True)} | {prose(token.part)} | {' | '.join(row)} |"


def _checks(content: Content) -> Iterator[str]:
    if content.checks:
        yield "\n| stage | passed | failed | skipped |\n|---|---:|---:|---:|"
    for stage in dict.fromkeys(check.stage for check in content.checks):
        mine = [check.status for check in content.checks if check.stage == stage]
        failed = sum(status in ("failed", "error") for status in mine)
        mark = "❌" if failed else "✅" if "passed" in mine else "➖"
        yield f"| {mark} {prose(stage)} | {mine.count('passed')} | {failed} | {mine.count('skipped')} |"
    told = [check for check in content.checks if check.status in ("failed", "error", "expected-failure")]
    yield from (_check(check) for check in told)


def _check(check: ShownCheck) -> str:
    first = next((line for line in check.message.split("\n") if line.strip()), "")
    return f"\n- {MARKS[check.status]} **{prose(check.claim)}** ({prose(check.stage)}): {prose(first)}"


def _turns(content: Content) -> Iterator[str]:
    tried = [turn for turn in content.turns if turn.trained]
    if tried:
        yield f"\nRound trip: {sum(turn.exact for turn in tried)} of {len(tried)} assistant turns came back exactly."
    for turn in [turn for turn in tried if not turn.exact][:3]:
        yield f"- {prose(turn.title)}: trained {code(turn.expected)}, said {code(turn.generated)}"


def _footer(content: Content) -> Iterator[str]:
    if content.command:
        yield f"\nReproduce: {code(content.command)}"
