"""Shows which tokens of a row are supervised: as text with cues, as tables around each turn, as JSON.

The cues come from ``EncodedRow.supervised``, from which the labels are made; segments only state whose tokens they are.
A supervised run is green *and* in ``⟦…⟧``, and a line that begins inside one has a heavier rule at its left, so it can
be read without colour. All text of a conversation passes through ``safe_text``, so that it cannot imitate a cue, a fold
or a control token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from glm4ft.report.mask_totals import WRONG, bordered_table
from glm4ft.report.plain_words import number_of, percent
from glm4ft.text.safe_text import Ruled, visible
from glm4ft.text.token_text import TokenDecoder, Unit

if TYPE_CHECKING:
    from glm4ft.data.chat_format import ChatFormat
    from glm4ft.data.encoded_row import EncodedRow, Segment

SCHEMA = 1
OPEN, CLOSE = "⟦", "⟧"
FOLD_OPEN, FOLD_CLOSE = "⟨…", "…⟩"
SUPERVISED, IGNORED = "bold green", "dim"
CONTROL = {True: "bold cyan", False: "cyan"}
CONTEXT_TOKENS = 12  # shown at both ends of a folded run
LEAST_FOLDED = 8  # a fold of fewer tokens would save nothing, because its label is as long
BOUNDARY_TOKENS = 3  # shown on each side of a boundary


@dataclass(frozen=True)
class _Run:
    """Neighbouring tokens of one segment that are all supervised or all ignored."""

    segment: Segment
    start: int
    supervised: bool
    units: tuple[Unit, ...]


def mask_record(index: int, row: EncodedRow | None, *, line: int, dropped: str | None) -> dict[str, Any]:
    """Make the object that ``glm4ft inspect --json`` writes for one conversation.

    Args:
        index: The index of the conversation as read, from 0.
        row: The row of the conversation; None if it was dropped.
        line: The line of the conversation in the file, from 1.
        dropped: The reason why the conversation was dropped; None if there is a row.

    Returns:
        An object for ``json.dumps``; ``labels`` are unshifted, -100 where a token is not supervised.

    Raises:
        ValueError: If not exactly one of ``row`` and ``dropped`` is given.
    """
    if (row is None) == (dropped is None):
        raise ValueError(f"conversation {index}: exactly one of row and dropped is needed")
    head = {"schema": SCHEMA, "index": index, "line": line}
    if row is None:
        return {**head, "dropped": dropped}
    return {**head, "input_ids": row.input_ids, "labels": row.labels}


def render_legend() -> Text:
    """Render one line that explains the cues."""
    return Text.assemble(
        (f"{OPEN}supervised{CLOSE}", SUPERVISED), " ", ("ignored", IGNORED), " ", ("<|control token|>", CONTROL[False]),
        f" ↵ newline ⇥ tab {FOLD_OPEN} folded {FOLD_CLOSE} \\x1b escape",
    )  # fmt: skip


def render_row(row: EncodedRow, chat_format: ChatFormat, *, boundaries: bool = False) -> RenderableType:
    """Render a row for the terminal or a log, at any width, with or without colour.

    Args:
        row: The row to show.
        chat_format: The chat format that encoded the row.
        boundaries: Whether to add a table of the tokens around each assistant turn's start and end.

    Returns:
        A renderable for ``Console.print``. Every line with text of the conversation starts with a vertical rule.
    """
    text = Ruled(mask_text(row, chat_format), cues=OPEN + CLOSE, style=SUPERVISED)
    tables = _boundary_tables(row, _decoder(chat_format)) if boundaries else ()
    return Group(_summary(row), text, *tables)


def mask_text(row: EncodedRow, chat_format: ChatFormat, *, context_tokens: int = CONTEXT_TOKENS) -> Text:
    """Format the row's text with its cues, not yet broken into lines of the terminal.

    Args:
        row: The row to show.
        chat_format: The chat format that encoded the row.
        context_tokens: The number of tokens shown at both ends of a long ignored run when it is folded.

    Returns:
        Text in which exactly the supervised tokens are between ``⟦`` and ``⟧``. To print it use ``render_row``: if the
        terminal breaks a line, the next one could start with a command to a CI runner.
    """
    decoder = _decoder(chat_format)
    text, is_open = Text(), False
    for run in _runs(row, decoder):
        if run.supervised != is_open:
            text.append(OPEN if run.supervised else CLOSE, SUPERVISED)
            is_open = run.supervised
        head, num_folded, tail = _fold(run, context_tokens)
        _append_units(text, head, run.supervised, decoder)
        if num_folded:
            whose = run.segment.role or run.segment.part
            text.append(f"{FOLD_OPEN} {num_folded:,} ignored tokens ({whose}) {FOLD_CLOSE}", "italic")
            _append_units(text, tail, run.supervised, decoder)
    if is_open:
        text.append(CLOSE, SUPERVISED)
    return text


def _decoder(chat_format: ChatFormat) -> TokenDecoder:
    return TokenDecoder(chat_format.tokenizer, cues=(OPEN, CLOSE, FOLD_OPEN))


def _runs(row: EncodedRow, decoder: TokenDecoder) -> Iterator[_Run]:
    for segment in row.segments:
        span = range(segment.start, segment.end)
        for supervised, group in itertools.groupby(span, key=row.supervised.__getitem__):
            positions = list(group)
            ids = row.input_ids[positions[0] : positions[-1] + 1]
            yield _Run(segment, positions[0], supervised, tuple(decoder.units(ids, positions[0])))


def _fold(run: _Run, context_tokens: int) -> tuple[tuple[Unit, ...], int, tuple[Unit, ...]]:
    """Return the units before the fold, the number of tokens in the fold, and the units after it."""
    end = run.units[-1].end
    head = tuple(unit for unit in run.units if unit.end - run.start <= context_tokens)
    tail = tuple(unit for unit in run.units if end - unit.start <= context_tokens)
    num_folded = (tail[0].start if tail else end) - (head[-1].end if head else run.start)
    if run.supervised or num_folded < LEAST_FOLDED:
        return run.units, 0, ()
    return head, num_folded, tail


def _append_units(text: Text, units: tuple[Unit, ...], supervised: bool, decoder: TokenDecoder) -> None:
    for is_control, group in itertools.groupby(units, key=lambda unit: unit.is_control):
        if is_control:
            text.append("".join(visible(unit.text, newlines=False) for unit in group), CONTROL[supervised])
        else:
            # escaped together: whether a joiner or a "::" is harmless depends on its neighbours
            shown = decoder.show("".join(unit.text for unit in group))
            text.append(shown, SUPERVISED if supervised else IGNORED)


def _summary(row: EncodedRow) -> Text:
    num_tokens, num_supervised = len(row.input_ids), sum(row.supervised)
    num_trained = sum(turn.supervised for turn in row.turns)
    where = f"line {row.line}" if row.line else "row"
    share = f"{num_supervised:,} supervised ({percent(num_supervised, num_tokens)})"
    return Text.assemble(
        f"{where}: {number_of(num_tokens, 'token')}, ",
        (share, "" if num_supervised else WRONG),
        f", {num_trained} of {number_of(len(row.turns), 'assistant turn')} trained",
    )


def _boundary_tables(row: EncodedRow, decoder: TokenDecoder) -> Iterator[Table]:
    """Yield a table for each assistant turn, with the tokens around its start and its end."""
    units = [unit for run in _runs(row, decoder) for unit in run.units for _ in _span(unit)]
    segments = [segment for segment in row.segments for _ in _span(segment)]
    near = BOUNDARY_TOKENS
    for number, turn in enumerate(row.turns, 1):
        title = f"turn {number} (message {turn.message}): starts at {turn.start}, terminator at {turn.end}"
        table = bordered_table("position", "id", "token", "role", "part", "loss", title=Text(title))
        shown = {*range(turn.start - near, turn.start + near), *range(turn.end + 1 - near, turn.end + 1 + near)}
        previous = None
        for position in sorted(shown & set(range(len(units)))):
            if previous is not None and position > previous + 1:
                table.add_row("…", "", Text(number_of(position - previous - 1, "more token"), style="italic"))
            table.add_row(*_token_cells(row, position, units[position], segments[position], decoder))
            previous = position
        yield table


def _token_cells(row: EncodedRow, position: int, unit: Unit, segment: Segment, decoder: TokenDecoder) -> Iterator[Text]:
    token_id, supervised = row.input_ids[position], row.supervised[position]
    style = SUPERVISED if supervised else IGNORED
    yield Text(str(position))
    yield Text(str(token_id))
    yield Text(decoder.show_token(token_id, position, unit), style=CONTROL[supervised] if unit.is_control else style)
    yield Text(segment.role or "-")
    yield Text("terminator" if position in {turn.end for turn in row.turns} else segment.part)
    yield Text("supervised" if supervised else "ignored", style=style)


def _span(piece: Unit | Segment) -> range:
    return range(piece.start, piece.end)
