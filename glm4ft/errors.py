"""The one error type a user sees: what is wrong, where, and how to mend it."""

from __future__ import annotations


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
