"""Conversations that cannot be used: all of them are counted, and the first are told in one error."""

from __future__ import annotations

from collections.abc import Sequence

from glm4ft.data.read_options import OnError
from glm4ft.errors import DataError

TOLD = 10
_WAY_OUT = "leave such conversations out with --on_error skip"


class ManyErrors(DataError):
    """Several conversations cannot be used.

    Args:
        errors: The first errors, in the order of the file.
        count: The number of all.
        read: The number of conversations that were read.
    """

    def __init__(self, errors: Sequence[DataError], count: int, read: int) -> None:
        self.errors, self.count, self.read = errors, count, read
        super().__init__(
            f"{count:,} of {read:,} conversations cannot be used",
            where=errors[0].where,
            fix=f"correct them, or {_WAY_OUT}",
        )

    def explain(self) -> str:
        """Format the errors as text: those of one kind together, with the place and the value of each."""
        more = f"; the first {len(self.errors)}:" if self.count > len(self.errors) else ":"
        lines, kinds = [self.message + more], dict[tuple[str, str, str], list[DataError]]()
        for error in self.errors:
            kinds.setdefault((error.message, error.expected, error.fix), []).append(error)
        for (message, expected, fix), errors in kinds.items():
            lines += ["", f"  {message}"]
            lines += [
                f"    {error.where}: found {error.found}" if error.found else f"    {error.where}" for error in errors
            ]
            lines += [f"    {label + ':':<10}{text}" for label, text in (("expected", expected), ("fix", fix)) if text]
        return "\n".join([*lines, "", f"  fix: {self.fix}"])


class Refusals:
    """Collects the conversations of a file that cannot be used.

    Args:
        on_error: Whether they end the reading, once all are known, or are skipped and counted.
        will_stop: Whether the reading is bound to end in an error already.
    """

    def __init__(self, on_error: OnError = "stop", *, will_stop: bool = False) -> None:
        self.on_error, self._will_stop = on_error, will_stop
        self.first: list[DataError] = []
        self.count, self.read = 0, 0
        self._new: list[tuple[str, int]] = []

    def add(self, error: DataError, line: int) -> None:
        """Count a conversation that cannot be used.

        Args:
            error: What is wrong with it.
            line: Its line, or the number of its record.
        """
        self.count += 1
        self._new.append((error.message, line))
        if len(self.first) < TOLD:
            self.first.append(error)

    def extend(self, others: Refusals) -> None:
        """Count the conversations of what was read next.

        Args:
            others: What was collected there.
        """
        self.count, self.read = self.count + others.count, self.read + others.read
        self.first = [*self.first, *others.first][:TOLD]

    def new(self) -> list[tuple[str, int]]:
        """The reasons and lines that were added since the last call."""
        new, self._new = self._new, []
        return new

    @property
    def will_stop(self) -> bool:
        """Whether the reading is bound to end in an error, so that nothing more has to be encoded."""
        return self._will_stop or (self.count > 0 and self.on_error == "stop")

    def settle(self) -> None:
        """Raise what was collected, unless it is to be skipped; called once all is read.

        Raises:
            DataError: If a conversation cannot be used.
        """
        if not self.will_stop:
            return
        if self.count > 1:
            raise ManyErrors(self.first, self.count, self.read)
        (error,) = self.first
        fix = f"{error.fix}; or {_WAY_OUT}" if error.fix else _WAY_OUT
        told = DataError(error.message, where=error.where, found=error.found, expected=error.expected, fix=fix)
        raise told from error
