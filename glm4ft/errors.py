"""Errors that a user sees: what is wrong, where, and how to fix it."""

from __future__ import annotations

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
        """Format the error as text, with one labelled line for each fact that is known."""
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
    """A run had to stop, for example because of non-finite numbers, missing targets or a full disk.

    The command line prints it as one block and exits with status 1.
    """


def show(value: Any, *, limit: int = 80) -> str:
    """Format a value for an error message: escaped by ``repr`` and at most about ``limit`` characters long."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # an int that is too long to print, or a value that is nested too deeply
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


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
