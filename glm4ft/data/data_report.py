"""What became of the conversations of a data set, in numbers and in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from glm4ft.errors import Unit

if TYPE_CHECKING:
    from glm4ft.data.encoding import Encoded

WARNING_KINDS = 20  # counted apart: warnings quote names from the data
_KEYS_SHOWN = 12


@dataclass
class DataReport:
    """What became of the conversations of one input, or of several together.

    Args:
        path: The file, or the names of all inputs.
        conversations: The number of conversations read, without those that cannot be used.
        rows: The number of rows in an epoch: of the encoded conversations kept, as often as their weight says.
        tokens: The number of tokens in all rows.
        supervised_tokens: The number of supervised tokens among them.
        dropped: Reasons mapped to the lines of the conversations dropped for them.
        truncated: The lines of the conversations that lost their oldest turns.
        warnings: Warnings mapped to the lines they apply to.
        unusable: Reasons mapped to the lines of the conversations that cannot be used and were skipped.
        unused: Keys without a meaning for training, mapped to the number of conversations that have them.
        last: The line of the last conversation.
        unit: What the lines count.
        weight: How often the rows are trained in an epoch.
        damage: What was wrong with the rows in the cache, so that they were encoded again; "" if nothing was.
        parts: The reports of the inputs, if there are several; their lines are those of their files.
    """

    path: str
    conversations: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    truncated: list[int] = field(default_factory=list)
    warnings: dict[str, list[int]] = field(default_factory=dict)
    unusable: dict[str, list[int]] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    last: int = 0
    unit: Unit = "line"
    weight: float = 1.0
    damage: str = ""
    parts: list[DataReport] = field(default_factory=list)

    def add(self, outcome: Encoded) -> None:
        """Count what became of one record.

        Args:
            outcome: What became of it.
        """
        self.last, conversation, row = outcome.line, outcome.conversation, outcome.row
        if conversation is None:
            self.unusable.setdefault(warning_kind(outcome.reason, self.unusable), []).append(outcome.line)
            return
        self.conversations, self.unit = self.conversations + 1, conversation.unit
        for warning in outcome.warnings:
            self.warnings.setdefault(warning_kind(warning, self.warnings), []).append(outcome.line)
        count_keys(self.unused, conversation.unused)
        if row is None:
            self.dropped.setdefault(outcome.reason, []).append(outcome.line)
            return
        if outcome.is_cut:
            self.truncated.append(outcome.line)
        self.rows, self.tokens = self.rows + 1, self.tokens + len(row.input_ids)
        self.supervised_tokens += sum(row.supervised)

    @classmethod
    def of_parts(cls, parts: list[DataReport]) -> DataReport:
        """The report of several inputs together, whose lines are counted on from one to the next."""
        whole, offset = cls(", ".join(part.path for part in parts), parts=parts), 0
        for part in parts:
            whole.extend(part, offset)
            offset += part.last
        return whole

    def extend(self, part: DataReport, offset: int = 0) -> None:
        """Count what became of further records.

        Args:
            part: The report of these records.
            offset: What is added to their lines.
        """
        for name in ("conversations", "rows", "tokens", "supervised_tokens"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for name in ("dropped", "warnings", "unusable"):
            known = getattr(self, name)
            for text, lines in getattr(part, name).items():
                known.setdefault(warning_kind(text, known), []).extend(line + offset for line in lines)
        self.last = max(self.last, offset + part.last)
        self.unit = part.unit if part.conversations else self.unit
        self.truncated += [line + offset for line in part.truncated]
        count_keys(self.unused, part.unused, part.unused)

    @property
    def num_unusable(self) -> int:
        """The number of conversations that cannot be used and were skipped."""
        return sum(map(len, self.unusable.values()))

    def describe(self) -> str:
        """The report as text: one line of totals, then one line per thing worth a look."""
        share = f" ({self.supervised_tokens / self.tokens:.0%})" if self.tokens else ""
        lines = [
            f"{self.path}: {self.conversations:,} conversation{'s' * (self.conversations != 1)}, "
            f"{self.rows:,} row{'s' * (self.rows != 1)}, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised{share}"
        ]
        if self.weight != 1:
            lines[0] += f", weight {self.weight:g}"
        if self.parts:
            return "\n".join([*lines, *(f"  {line}" for line in self._describe_parts())])
        lines += [f"  SKIPPED, {reason}: {self._list(where)}" for reason, where in self.unusable.items()]
        lines += [f"  dropped, {reason}: {self._list(where)}" for reason, where in self.dropped.items()]
        if self.truncated:
            lines.append(f"  oldest turns cut to fit max_length: {self._list(self.truncated)}")
        lines += [f"  warning, {text}: {self._list(where)}" for text, where in self.warnings.items()]
        if self.damage:
            lines.append(f"  encoded again, since the rows in the cache were damaged: {self.damage}")
        if self.unused:
            lines.append(f"  {unused_keys(self.unused)}")
        return "\n".join(lines)

    def _describe_parts(self) -> Iterator[str]:
        before = 0
        for part in self.parts:
            yield from part.describe().split("\n")
            if before:  # rows of all inputs are named by lines that no two of them share
                yield f"  its {part.unit} 1 is called line {before + 1:,} where rows of all inputs are shown"
            before += part.last

    def skipped_sentence(self) -> str:
        """What was left out because it cannot be used, for the last lines of a run; "" if nothing was."""
        if not self.num_unusable:
            return ""
        read = self.conversations + self.num_unusable
        return (
            f"trained WITHOUT {self.num_unusable:,} of {read:,} conversations, which cannot be used (--on_error skip)"
        )

    def _list(self, lines: list[int]) -> str:
        return list_lines(lines, self.unit)


def list_lines(lines: list[int], unit: Unit = "line") -> str:
    """A number of lines, and the first of them."""
    shown = ", ".join(str(line) for line in lines[:10])
    return f"{len(lines):,} ({unit}{'s' if len(lines) > 1 else ''} {shown}{', ...' if len(lines) > 10 else ''})"


def warning_kind(text: str, known: Iterable[str]) -> str:
    """The warning without its message's index, or a large file would have a kind of warning on every line.

    Args:
        text: The warning.
        known: The kinds that are counted already.
    """
    kind, kinds = re.sub(r"\[\d+\]", "[*]", text), list(known)
    return kind if kind in kinds or len(kinds) < WARNING_KINDS else "other warnings"


def count_keys(counts: dict[str, int], keys: Iterable[str], by: dict[str, int] | None = None) -> None:
    """Count keys without a meaning, as many kinds as are told."""
    for key in keys:
        name = key if key in counts or len(counts) < 10 * WARNING_KINDS else "..."
        counts[name] = counts.get(name, 0) + (by[key] if by else 1)


def unused_keys(counts: dict[str, int]) -> str:
    """Keys that nothing is read from, as one line: the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"{key} ({count:,})" for key, count in ordered[:_KEYS_SHOWN])
    return f"not used, keys: {shown}{', ...' if len(ordered) > _KEYS_SHOWN else ''}"
