"""Counts the tokens of a file by kind, with its dropped conversations and warnings, and shows the totals as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from glm4ft.data.data_report import unused_keys, warning_kind
from glm4ft.report.plain_words import number_of, percent
from glm4ft.text.safe_text import visible

if TYPE_CHECKING:
    from glm4ft.data.encoded_row import EncodedRow, Segment

WRONG = "bold red"
FIRST_LINES = 5  # line numbers shown for each reason or warning

# The kinds of tokens in the totals. The label of a role covers its bodies only, so that a supervised header is visible.
LABELS = ("prefix", "header", "system", "user", "observation", "assistant", "terminator")
NEVER_SUPERVISED = LABELS[:5]


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
    outer.add_row(Text(f"{number_of(totals.conversations, 'conversation')}, {number_of(totals.rows, 'row')}"))
    counts = bordered_table("tokens of", "all", "supervised", "share")
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
        events = bordered_table("what", "count", "first lines")
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
    yield Text(percent(num_supervised, num_tokens))


def _label(segment: Segment, ends: set[int]) -> str:
    if segment.part == "terminator" or (segment.part == "header" and segment.start in ends):
        return "terminator"
    return segment.role if segment.part == "body" else segment.part


def bordered_table(*columns: str, title: Text | None = None) -> Table:
    """Make a table with a border at the left of every line, so that no line starts with text from the data.

    Args:
        columns: The names of the columns.
        title: The title above the table.
    """
    table = Table(box=box.SQUARE, title=title, title_justify="left", title_style="")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
