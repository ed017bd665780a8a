"""A point at which a recorded run differs from the specification."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Departure:
    """A point at which a run differs from the specification.

    Args:
        stage: The slug of the stage.
        step: The optimizer step, from 1.
        text: What was found and what was expected.
        cause: The likely cause, if the numbers show it; "" otherwise.
        size: The relative size of the departure; None if it is not measured by a number.
        factor: The factor on the whole gradient, if that explains the departure; None otherwise.
        hides: The judges of the same step whose comparison it makes meaningless, by their names in ``JUDGES``.
        hides_later: The same for the steps that follow.
    """

    stage: str
    step: int
    text: str
    cause: str = ""
    size: float | None = None
    factor: float | None = None
    hides: tuple[str, ...] = ()
    hides_later: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The words of the cause, or without one of the text; departures of one kind are told once."""
        return " ".join(re.findall(r"[a-zA-Z_]+", self.cause or self.text))

    def __str__(self) -> str:
        cause = f"; likely cause: {self.cause}" if self.cause else ""
        return f"{self.stage}, step {self.step}: {self.text}{cause}"


Departures = Iterator[Departure]
