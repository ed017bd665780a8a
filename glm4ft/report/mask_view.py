"""Shows which tokens of a row are supervised: as text with cues, as tables around each turn, as totals, as JSON.

The cues come from ``EncodedRow.supervised``, from which the labels are made; segments only state whose tokens they are.
A supervised run is green *and* in ``⟦…⟧``, and a line that begins inside one has a heavier rule at its left, so it can
be read without colour. All text of a conversation passes through ``safe_text``, so that it cannot imitate a cue, a fold
or a control token.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from glm4ft.data.data_report import unused_keys, warning_kind
from glm4ft.text.safe_text import Ruled, visible
from glm4ft.text.token_text import TokenDecoder, Unit

if TYPE_CHECKING:
    from glm4ft.data.chat_format import ChatFormat
    from glm4ft.data.encoded_row import EncodedRow, Segment

SCHEMA = 1
OPEN, CLOSE = "⟦", "⟧"
FOLD_OPEN, FOLD_CLOSE = "⟨…", "…⟩"
SUPERVISED, IGNORED, WRONG = "bold green", "dim", "bold red"
CONTROL = {True: "bold cyan", False: "cyan"}
CONTEXT_TOKENS = 12  # shown at both ends of a folded run
LEAST_FOLDED = 8  # a fold of fewer tokens would save nothing, because its label is as long
BOUNDARY_TOKENS = 3  # shown on each side of a boundary
FIRST_LINES = 5  # line numbers shown for each reason or warning

# The kinds of tokens in the totals. The label of a role covers its bodies only, so that a supervised header is visible.
LABELS = ("prefix", "header", "system", "user", "observation", "assistant", "terminator")
NEVER_SUPERVISED = LABELS[:5]


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


@dataclass
class Lines:
    """The number of occurrences of an event, and the lines of the first ones.

    Args:
        count: The number of occurrences.
        first: The first few line numbers in the file.
    """

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        """Count an occurrence on the given line."""
        self.count += 1
        if len(self.first) < FIRST_LINES and line not in self.first:
            self.first.append(line)

    def __str__(self) -> str:
        return ", ".join(map(str, self.first)) + (", …" if len(self.first) == FIRST_LINES < self.count else "")


@dataclass
class Totals:
    """The totals of a file; their memory does not grow with the number of conversations.

    Args:
        conversations: The number of conversations read.
        rows: The number of conversations that were not dropped.
        tokens: The number of tokens by label.
        supervised: The number of supervised tokens by label.
        dropped: The lines of dropped conversations by reason.
        warnings: The lines of warnings by text, without the message's index.
        unused: The number of conversations by the key that nothing is read from.
    """

    conversations: int = 0
    rows: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    supervised: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Lines] = field(default_factory=dict)
    warnings: dict[str, Lines] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)

    def add(
        self, row: EncodedRow | None, *, line: int, dropped: str | None = None, warnings: Iterable[str] = ()
    ) -> None:
        """Count one conversation.

        Args:
            row: The row of the conversation; None if it was dropped.
            line: The line of the conversation in the file.
            dropped: The reason why the conversation was dropped; None if there is a row.
            warnings: The warnings of the conversation.

        Raises:
            ValueError: If not exactly one of ``row`` and ``dropped`` is given.
        """
        if (row is None) == (dropped is None):
            raise ValueError(f"line {line}: exactly one of row and dropped is needed")
        self.conversations += 1
        for warning in warnings:
            self.warnings.setdefault(warning_kind(warning, self.warnings), Lines()).add(line)
        if row is None:
            self.dropped.setdefault(warning_kind(dropped or "no reason given", self.dropped), Lines()).add(line)
            return
        self.rows += 1
        ends = {turn.end for turn in row.turns}
        for segment in row.segments:
            label = _label(segment, ends)
            self.tokens[label] += segment.end - segment.start
            self.supervised[label] += sum(row.supervised[segment.start : segment.end])


def render_totals(totals: Totals) -> Table:
    """Render the totals as tables: tokens by label, then dropped conversations and warnings."""
    outer = Table.grid()
    outer.add_row(Text(f"{_plural(totals.conversations, 'conversation')}, {_plural(totals.rows, 'row')}"))
    counts = _table("tokens of", "all", "supervised", "share")
    for column in counts.columns[1:]:
        column.justify = "right"
    for label in LABELS:
        if totals.tokens[label]:
            counts.add_row(*_count_cells(label, totals.tokens[label], totals.supervised[label]))
    counts.add_section()
    counts.add_row(*_count_cells("total", totals.tokens.total(), totals.supervised.total()))
    outer.add_row(counts)
    if totals.unused:
        outer.add_row(Text(visible(unused_keys(totals.unused), newlines=False)))
    if totals.dropped or totals.warnings:
        events = _table("what", "count", "first lines")
        for word, found in (("dropped", totals.dropped), ("warning", totals.warnings)):
            for text, lines in found.items():
                what = f"{word}: {visible(text, newlines=False)}"
                events.add_row(*map(Text, (what, f"{lines.count:,}", str(lines))))
        outer.add_row(events)
    return outer


def _count_cells(label: str, num_tokens: int, num_supervised: int) -> Iterator[Text]:
    is_wrong = label in NEVER_SUPERVISED and num_supervised > 0
    yield Text(label)
    yield Text(f"{num_tokens:,}")
    yield Text(f"{num_supervised:,}" + (" (should be 0)" if is_wrong else ""), style=WRONG if is_wrong else "")
    yield Text(_percent(num_supervised, num_tokens))


def _label(segment: Segment, ends: set[int]) -> str:
    if segment.part == "terminator" or (segment.part == "header" and segment.start in ends):
        return "terminator"
    return segment.role if segment.part == "body" else segment.part


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _percent(part: int, whole: int) -> str:
    """Format a percentage, rounded down so that 100% means all; only zero is shown as 0%."""
    return "<1%" if 0 < part * 100 < whole else f"{part * 100 // max(whole, 1)}%"


def _table(*columns: str, title: Text | None = None) -> Table:
    """Make a table with a border at the left of every line, so that no line starts with text from the data."""
    table = Table(box=box.SQUARE, title=title, title_justify="left", title_style="")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


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
    share = f"{num_supervised:,} supervised ({_percent(num_supervised, num_tokens)})"
    return Text.assemble(
        f"{where}: {_plural(num_tokens, 'token')}, ",
        (share, "" if num_supervised else WRONG),
        f", {num_trained} of {_plural(len(row.turns), 'assistant turn')} trained",
    )


def _boundary_tables(row: EncodedRow, decoder: TokenDecoder) -> Iterator[Table]:
    """Yield a table for each assistant turn, with the tokens around its start and its end."""
    units = [unit for run in _runs(row, decoder) for unit in run.units for _ in _span(unit)]
    segments = [segment for segment in row.segments for _ in _span(segment)]
    near = BOUNDARY_TOKENS
    for number, turn in enumerate(row.turns, 1):
        title = f"turn {number} (message {turn.message}): starts at {turn.start}, terminator at {turn.end}"
        table = _table("position", "id", "token", "role", "part", "loss", title=Text(title))
        shown = {*range(turn.start - near, turn.start + near), *range(turn.end + 1 - near, turn.end + 1 + near)}
        previous = None
        for position in sorted(shown & set(range(len(units)))):
            if previous is not None and position > previous + 1:
                table.add_row("…", "", Text(_plural(position - previous - 1, "more token"), style="italic"))
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
