"""The errors a user sees: what is wrong, where, and how to fix it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class InputError(Exception):
    """Something the user gave cannot be used; nothing has been written.

    The command line prints it as one block and exits with status 2.

    Args:
        message: what is wrong, in one sentence.
        where: the place: file, line and field, or the name of the option.
        found: what stands there now.
        expected: what would have been accepted.
        fix: what to do about it.
    """

    def __init__(self, message: str, *, where: str = "", found: str = "", expected: str = "", fix: str = "") -> None:
        self.message, self.where, self.found, self.expected, self.fix = message, where, found, expected, fix
        super().__init__(self.explain())

    def explain(self) -> str:
        """The whole block as text, one labelled line per fact that is known."""
        facts = [("where", self.where), ("found", self.found), ("expected", self.expected), ("fix", self.fix)]
        lines = [self.message, *(f"  {label + ':':<10}{text}" for label, text in facts if text)]
        return "\n".join(lines)


class ConfigError(InputError):
    """An option has a value that cannot be used."""


class DataError(InputError):
    """A conversation file, or one line of it, cannot be used."""


class ModelError(InputError):
    """A checkpoint, tokenizer or adapter folder cannot be used."""


class RunError(Exception):
    """A run had to stop: non-finite numbers, no targets, a full disk.

    The command line prints it as one block and exits with status 1.
    """


def show(value: Any, *, limit: int = 80) -> str:
    """A value as it may stand in an error: escaped by ``repr`` and at most about ``limit`` characters long."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # an int too long to print; a value too deep to walk
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(frozen=True)
class Location:
    """Where something stands: a file, a line in it (1-based; 0 = unknown), a field of the record."""

    path: str = ""
    line: int = 0
    field: str = ""

    def key(self, name: str) -> Location:
        """The location of one key of the object that stands here."""
        plain = name if name.isidentifier() else show(name)
        return Location(self.path, self.line, f"{self.field}.{plain}" if self.field else plain)

    def item(self, index: int) -> Location:
        """The location of one item of the list that stands here."""
        return Location(self.path, self.line, f"{self.field}[{index}]")

    def __str__(self) -> str:
        numbered = f"{self.path}:{self.line}" if self.path else f"line {self.line}"
        file = numbered if self.line else self.path
        return ": ".join(part for part in (file, self.field) if part)

    def wrong(self, problem: str, value: Any, expected: str, fix: str = "") -> DataError:
        """A DataError that shows the value found here, to be raised by the caller."""
        return DataError(problem, where=str(self), found=show(value), expected=expected, fix=fix)
