"""Errors that a user sees: what is wrong, where, and how to fix it."""

from __future__ import annotations

import itertools
import reprlib
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["line", "record"]


class InputError(Exception):
    """An option, a file or a folder that the user gave cannot be used; nothing has been written.

    The command line prints it as one block and exits with status 2.

    Args:
        message: The mistake, in one sentence.
        where: The place of the mistake: file, line and field, or the name of the option.
        found: The value found there.
        expected: The values that would have been accepted.
        fix: The action that corrects the mistake.
    """

    def __init__(self, message: str, *, where: str = "", found: str = "", expected: str = "", fix: str = "") -> None:
        self.message, self.where, self.found, self.expected, self.fix = message, where, found, expected, fix
        super().__init__(self.explain())

    def explain(self) -> str:
        """Format the error as harmless text, with one labelled line for each fact that is known."""
        facts = [("where", self.where), ("found", self.found), ("expected", self.expected), ("fix", self.fix)]
        lines = [self.message, *(f"  {label + ':':<10}{text}" for label, text in facts if text)]
        return "\n".join(harmless(line.replace("\n", "\\n")) for line in lines)


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end.

    Args:
        signal_number: The number of the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.signal_number = signal_number


class ConfigError(InputError):
    """An option has a value that cannot be used."""


class DataError(InputError):
    """A conversation file, or one line of it, cannot be used."""


class ModelError(InputError):
    """A checkpoint, tokenizer or adapter folder cannot be used."""


class RunError(Exception):
    """A run had to stop, for example because of non-finite numbers, missing targets or a full disk.

    The command line prints it as one block and exits with status 1.
    """


def harmless(text: str) -> str:
    """Make a text safe to print that quotes names and values from files, as ``text.safe_text.harmless`` does.

    Args:
        text: Any text.
    Returns:
        The text, with escapes in place of what could move a cursor, hide characters or command a CI runner.
    """
    if text.isascii() and text.replace("\n", "").isprintable() and "::" not in text and "#" not in text:
        return text  # most texts: spare them the import
    from glm4ft.text import safe_text

    return safe_text.harmless(text)


def show(value: Any, *, limit: int = 80) -> str:
    """Format a value for an error message: escaped as by ``repr`` and at most about ``limit`` characters long."""
    try:
        text = _Repr(limit).repr(value)
    except (ValueError, RecursionError):  # an int that is too long to print, or a value that is nested too deeply
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _Repr(reprlib.Repr):
    """As ``repr``, but with a bounded cost: a value of a few kilobytes in YAML can stand for terabytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.maxlevel = limit, 5
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxother = self.maxlong = limit
        self._left = 4 * limit  # values to format in all

    def repr1(self, x: Any, level: int) -> str:
        self._left -= 1
        return "..." if self._left < 0 else super().repr1(x, level)

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[: self.limit + 1])

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0 and x:
            return "{...}"
        pairs = itertools.islice(x.items(), self.limit)  # in their order, which reprlib would sort
        return "{" + ", ".join(f"{self.repr1(key, level - 1)}: {self.repr1(v, level - 1)}" for key, v in pairs) + "}"


@dataclass(frozen=True)
class Location:
    """The place of a value in a data file.

    Args:
        path: The file; "" if unknown.
        line: The line in the file, from 1; 0 if unknown.
        field: The field of the record; "" for the whole record.
        unit: What ``line`` counts: lines, or the records of a file that has no line for each.
    """

    path: str = ""
    line: int = 0
    field: str = ""
    unit: Unit = "line"

    def key(self, name: str) -> Location:
        """Return the location of one key of the object at this location."""
        plain = name if name.isidentifier() else show(name)
        return Location(self.path, self.line, f"{self.field}.{plain}" if self.field else plain, self.unit)

    def item(self, index: int) -> Location:
        """Return the location of one item of the list at this location."""
        return Location(self.path, self.line, f"{self.field}[{index}]", self.unit)

    def __str__(self) -> str:
        if self.path and self.line and self.unit == "line":
            parts = [f"{self.path}:{self.line}", self.field]  # as editors and compilers write it
        else:
            parts = [self.path, f"{self.unit} {self.line}" if self.line else "", self.field]
        return ": ".join(part for part in parts if part)

    def wrong(self, problem: str, value: Any, expected: str, fix: str = "") -> DataError:
        """Return a DataError that shows the value at this location, to be raised by the caller."""
        return DataError(problem, where=str(self), found=show(value), expected=expected, fix=fix)
