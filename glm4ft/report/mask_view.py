"""Shows which tokens of a row are supervised: as text with cues, as tables around each turn, as totals, as JSON.

The cues come from ``Row.supervised``, what the loss is given; segments only say whose tokens they are. A supervised
run is green *and* in ``⟦…⟧``, and a line that begins inside one has a heavier rule at its left, so it can be read
without colour. All text of a conversation goes through ``safe_text``: what looks like a cue, a fold or a control
token is one.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import get_character_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from glm4ft.report.safe_text import visible

if TYPE_CHECKING:
    from glm4ft.chat_format import ChatFormat, Row, Segment

SCHEMA = 1
OPEN, CLOSE = "⟦", "⟧"
FOLD_OPEN, FOLD_CLOSE = "⟨…", "…⟩"
SUPERVISED, IGNORED, WRONG = "bold green", "dim", "bold red"
CONTROL = {True: "bold cyan", False: "cyan"}
CONTEXT_TOKENS = 12  # shown at both ends of a folded run
LEAST_FOLDED = 8  # a fold that hides fewer tokens than its own label is long saves nothing
BOUNDARY_TOKENS = 3  # shown on each side of a boundary
FIRST_LINES = 5  # of the file, shown for each reason or warning
WARNING_KINDS = 20  # counted apart; warnings quote names from the data, so a file could have a new kind on every line

# Whose tokens the totals count; a role stands for its bodies alone, so that a supervised header cannot hide in one.
LABELS = ("prefix", "header", "system", "user", "observation", "assistant", "terminator")
NEVER_SUPERVISED = LABELS[:5]


@dataclass(frozen=True)
class _Unit:
    """The fewest tokens that together decode to whole characters; a control token is one alone."""

    start: int
    end: int
    text: str
    is_control: bool


@dataclass(frozen=True)
class _Run:
    """Neighbouring tokens of one segment that are all supervised or all ignored."""

    segment: Segment
    start: int
    supervised: bool
    units: tuple[_Unit, ...]


def mask_record(index: int, row: Row | None, *, line: int, dropped: str | None) -> dict[str, Any]:
    """One conversation as ``glm4ft inspect --json`` writes it.

    Args:
        index: of the conversation as read, from 0.
        row: its row; None if it was dropped.
        line: its line in the file, from 1.
        dropped: why there is no row; None if there is one.

    Returns:
        An object for ``json.dumps``; ``labels`` are unshifted, -100 where a token is not supervised.

    Raises:
        ValueError: unless exactly one of ``row`` and ``dropped`` is given.
    """
    if (row is None) == (dropped is None):
        raise ValueError(f"conversation {index}: exactly one of row and dropped is needed")
    head = {"schema": SCHEMA, "index": index, "line": line}
    if row is None:
        return {**head, "dropped": dropped}
    return {**head, "input_ids": row.input_ids, "labels": row.labels}


def render_legend() -> Text:
    """One line that explains the cues."""
    return Text.assemble(
        (f"{OPEN}supervised{CLOSE}", SUPERVISED), " ", ("ignored", IGNORED), " ", ("<|control token|>", CONTROL[False]),
        f" ↵ newline ⇥ tab {FOLD_OPEN} folded {FOLD_CLOSE} \\x1b escape",
    )  # fmt: skip


def render_row(row: Row, chat_format: ChatFormat, *, boundaries: bool = False) -> RenderableType:
    """A row for the terminal or a log, at any width, with or without colour.

    Args:
        row: to show.
        chat_format: that encoded it; its tokenizer names the tokens.
        boundaries: add a table of the tokens around each assistant turn's start and end.

    Returns:
        A renderable for ``Console.print``. Every line with text of the conversation starts with a rule.
    """
    decoder = _Decoder(chat_format)
    parts: list[RenderableType] = [_summary(row), _Ruled(_mask_text(row, decoder, CONTEXT_TOKENS))]
    if boundaries:
        parts += [_boundary_table(row, number, decoder) for number in range(len(row.turns))]
    return Group(*parts)


def mask_text(row: Row, chat_format: ChatFormat, *, context_tokens: int = CONTEXT_TOKENS) -> Text:
    """The row's text with its cues, not yet broken into lines of the terminal.

    Args:
        row: to show.
        chat_format: that encoded it.
        context_tokens: left at both ends of a long ignored run when it is folded.

    Returns:
        Text; what stands between ``⟦`` and ``⟧`` is exactly what is supervised. To print it use ``render_row``: a
        line that a terminal width breaks could start with what a CI runner obeys.
    """
    return _mask_text(row, _Decoder(chat_format), context_tokens)


@dataclass
class Lines:
    """Where something happened.

    Args:
        count: how often.
        first: the first few lines of the file.
    """

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < FIRST_LINES and line not in self.first:
            self.first.append(line)

    def __str__(self) -> str:
        return ", ".join(map(str, self.first)) + (", …" if len(self.first) == FIRST_LINES < self.count else "")


@dataclass
class Totals:
    """What a whole file comes to; memory does not grow with the number of conversations.

    Args:
        conversations: as read.
        rows: those not dropped.
        tokens: by label.
        supervised: among them, by label.
        dropped: by reason.
        warnings: by text, without the message's index.
    """

    conversations: int = 0
    rows: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    supervised: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Lines] = field(default_factory=dict)
    warnings: dict[str, Lines] = field(default_factory=dict)

    def add(self, row: Row | None, *, line: int, dropped: str | None = None, warnings: Iterable[str] = ()) -> None:
        """Count one conversation.

        Args:
            row: its row; None if it was dropped.
            line: its line in the file.
            dropped: why there is no row.
            warnings: of the conversation.

        Raises:
            ValueError: unless exactly one of ``row`` and ``dropped`` is given.
        """
        if (row is None) == (dropped is None):
            raise ValueError(f"line {line}: exactly one of row and dropped is needed")
        self.conversations += 1
        for warning in warnings:
            kind = re.sub(r"\[\d+\]", "[*]", warning)
            if kind not in self.warnings and len(self.warnings) >= WARNING_KINDS:
                kind = "other warnings"
            self.warnings.setdefault(kind, Lines()).add(line)
        if row is None:
            self.dropped.setdefault(dropped or "no reason given", Lines()).add(line)
            return
        self.rows += 1
        ends = {turn.end for turn in row.turns}
        for segment in row.segments:
            label = _label(segment, ends)
            self.tokens[label] += segment.end - segment.start
            self.supervised[label] += sum(row.supervised[segment.start : segment.end])


def render_totals(totals: Totals) -> Table:
    """The totals as tables: tokens by label, then what was dropped and what was warned about."""
    outer = Table.grid()
    num_tokens, num_supervised = totals.tokens.total(), totals.supervised.total()
    outer.add_row(Text(f"{_plural(totals.conversations, 'conversation')}, {_plural(totals.rows, 'row')}"))
    counts = _table("tokens of", "all", "supervised", "share")
    for column in counts.columns[1:]:
        column.justify = "right"
    for label in LABELS:
        if totals.tokens[label]:
            counts.add_row(*_count_cells(label, totals.tokens[label], totals.supervised[label]))
    counts.add_section()
    counts.add_row(*_count_cells("total", num_tokens, num_supervised))
    outer.add_row(counts)
    if totals.dropped or totals.warnings:
        events = _table("what", "count", "first lines")
        for word, found in (("dropped", totals.dropped), ("warning", totals.warnings)):
            for text, lines in found.items():
                events.add_row(
                    Text(f"{word}: {visible(text, newlines=False)}"), Text(f"{lines.count:,}"), Text(str(lines))
                )
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
    """Rounded towards the middle: only all is 100%, and only none is 0%."""
    if not whole:
        return "-"
    return "<1%" if 0 < part * 100 < whole else f"{part * 100 // whole}%"


def _table(*columns: str, title: Text | None = None) -> Table:
    """A table with a rule at the left of every line, so that no line starts with text from the data."""
    table = Table(box=box.SQUARE, title=title, title_justify="left", title_style="")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


class _Decoder:
    """Reads the tokens of a byte-level BPE tokenizer back, byte by byte.

    Args:
        chat_format: whose tokenizer is meant.
    """

    def __init__(self, chat_format: ChatFormat) -> None:
        self._tokenizer = chat_format.tokenizer
        self._control = {i: name for name, i in self._tokenizer.get_added_vocab().items()}
        self.reserved = (OPEN, CLOSE, FOLD_OPEN, *self._control.values())

    def units(self, ids: list[int], start: int = 0) -> Iterator[_Unit]:
        """Group neighbouring tokens until their bytes are whole characters; bytes that never are become surrogates."""
        decoder, text, first, end = _utf8_decoder(), "", start, start + len(ids)
        for position, (token_id, token) in enumerate(zip(ids, self._names(ids), strict=True), start):
            name = self._control.get(token_id) or (f"<id {token_id}>" if token is None else None)
            if name is None:
                text += decoder.decode(_token_bytes(token or ""))
                if not decoder.getstate()[0]:
                    yield _Unit(first, position + 1, text, False)
                    text, first = "", position + 1
                continue
            if first < position:
                yield _Unit(first, position, text + decoder.decode(b"", final=True), False)
            yield _Unit(position, position + 1, name, True)
            decoder, text, first = _utf8_decoder(), "", position + 1
        if first < end:
            yield _Unit(first, end, text + decoder.decode(b"", final=True), False)

    def show(self, text: str, *, newlines: bool = True) -> str:
        r"""Text of the row as it may be printed; a byte without its character as ``\xe5``."""
        return _bytes_of_surrogates(visible(text, newlines=newlines, reserved=self.reserved))

    def show_token(self, token_id: int, position: int, unit: _Unit) -> str:
        """One token for a table: a control token's name, or quoted text; of a part of a character, its bytes."""
        if unit.is_control:
            return visible(unit.text, newlines=False)
        if unit.end - unit.start == 1:
            return f"'{self.show(unit.text, newlines=False)}'"
        own = _token_bytes(self._names([token_id])[0] or "").decode("utf-8", "surrogateescape")
        place = f"{position - unit.start + 1} of {unit.end - unit.start}"
        return f"'{self.show(own, newlines=False)}' ({place}: {self.show(unit.text, newlines=False)})"

    def _names(self, ids: list[int]) -> list[str | None]:
        return list(self._tokenizer.convert_ids_to_tokens(ids))


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("surrogateescape")


def _bytes_of_surrogates(shown: str) -> str:
    return re.sub(r"\\udc([89a-f][0-9a-f])", r"\\x\1", shown)


def _byte_symbols() -> dict[str, int]:
    """The byte that each symbol of byte-level BPE stands for: itself if it can be drawn, else 256 and up in order.

    Source: GPT-2's encoder, which every byte-level tokenizer follows.
    """
    drawn = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in drawn]
    return {chr(byte): byte for byte in drawn} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_SYMBOLS = _byte_symbols()


def _token_bytes(token: str) -> bytes:
    if not _BYTE_SYMBOLS.keys() >= set(token):
        return token.encode("utf-8", "surrogatepass")  # not from a byte-level vocabulary: taken for plain text
    return bytes(_BYTE_SYMBOLS[symbol] for symbol in token)


def _runs(row: Row, decoder: _Decoder) -> Iterator[_Run]:
    for segment in row.segments:
        span = range(segment.start, segment.end)
        for supervised, group in itertools.groupby(span, key=row.supervised.__getitem__):
            positions = list(group)
            ids = row.input_ids[positions[0] : positions[-1] + 1]
            yield _Run(segment, positions[0], supervised, tuple(decoder.units(ids, positions[0])))


def _mask_text(row: Row, decoder: _Decoder, context_tokens: int) -> Text:
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


def _fold(run: _Run, context_tokens: int) -> tuple[tuple[_Unit, ...], int, tuple[_Unit, ...]]:
    """The units before the fold, the number of tokens in it, and the units after it."""
    end = run.units[-1].end
    head = tuple(unit for unit in run.units if unit.end - run.start <= context_tokens)
    tail = tuple(unit for unit in run.units if end - unit.start <= context_tokens)
    num_folded = (tail[0].start if tail else end) - (head[-1].end if head else run.start)
    if run.supervised or num_folded < LEAST_FOLDED:
        return run.units, 0, ()
    return head, num_folded, tail


def _append_units(text: Text, units: tuple[_Unit, ...], supervised: bool, decoder: _Decoder) -> None:
    for is_control, group in itertools.groupby(units, key=lambda unit: unit.is_control):
        if is_control:
            text.append("".join(visible(unit.text, newlines=False) for unit in group), CONTROL[supervised])
        else:
            # together: whether a joiner or a "::" is harmless depends on its neighbours
            shown = decoder.show("".join(unit.text for unit in group))
            text.append(shown, SUPERVISED if supervised else IGNORED)


def _summary(row: Row) -> Text:
    num_tokens, num_supervised = len(row.input_ids), sum(row.supervised)
    num_trained = sum(turn.supervised for turn in row.turns)
    where = f"line {row.line}" if row.line else "row"
    share = f"{num_supervised:,} supervised ({_percent(num_supervised, num_tokens)})"
    return Text.assemble(
        f"{where}: {_plural(num_tokens, 'token')}, ",
        (share, "" if num_supervised else WRONG),
        f", {num_trained} of {_plural(len(row.turns), 'assistant turn')} trained",
    )


def _boundary_table(row: Row, number: int, decoder: _Decoder) -> Table:
    turn = row.turns[number]
    title = f"turn {number + 1} (message {turn.message}): starts at {turn.start}, terminator at {turn.end}"
    table = _table("position", "id", "token", "role", "part", "loss", title=Text(title))
    units = {position: unit for run in _runs(row, decoder) for unit in run.units for position in _span(unit)}
    segments = {position: segment for segment in row.segments for position in _span(segment)}
    near = BOUNDARY_TOKENS
    shown = {*range(turn.start - near, turn.start + near), *range(turn.end + 1 - near, turn.end + 1 + near)}
    previous = None
    for position in sorted(shown & set(units)):
        if previous is not None and position > previous + 1:
            table.add_row(Text("…"), Text(""), Text(_plural(position - previous - 1, "more token"), style="italic"))
        previous, token_id, segment = position, row.input_ids[position], segments[position]
        supervised, unit = row.supervised[position], units[position]
        style = SUPERVISED if supervised else IGNORED
        table.add_row(
            Text(str(position)),
            Text(str(token_id)),
            Text(decoder.show_token(token_id, position, unit), style=CONTROL[supervised] if unit.is_control else style),
            Text(segment.role or "-"),
            Text("terminator" if position == turn.end else segment.part),
            Text("supervised" if supervised else "ignored", style=style),
        )
    return table


def _span(piece: _Unit | Segment) -> range:
    return range(piece.start, piece.end)


class _Ruled:
    """Text with a rule at the left of every printed line, heavy where the line begins inside a supervised run.

    Lines are broken here and not by rich: rich drops the spaces at a break, and a broken line must get its rule.
    """

    def __init__(self, text: Text) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width - 2, 2)
        is_open = False
        for whole in self._text.split("\n"):
            for line in whole.divide(_breaks(whole.plain, width)):
                rule = ("┃ ", SUPERVISED) if is_open else ("│ ", IGNORED)
                last_open, last_close = line.plain.rfind(OPEN), line.plain.rfind(CLOSE)
                is_open = last_open > last_close if last_open != last_close else is_open
                yield Text.assemble(rule, line, no_wrap=True, overflow="ignore")


def _breaks(line: str, width: int) -> list[int]:
    """Offsets where a line is broken so that each piece fits: after a space if it holds one, and nothing is lost."""
    cells = [get_character_cell_size(char) + (line[at + 1 : at + 2] == "\ufe0f") for at, char in enumerate(line)]
    breaks, start, after_space, used = [], 0, 0, 0
    for at, char in enumerate(line):
        while used + cells[at] > width and at > start:
            start = after_space if after_space > start else at
            used = sum(cells[start:at])
            breaks.append(start)
        used += cells[at]
        if char == " ":
            after_space = at + 1
    return breaks
