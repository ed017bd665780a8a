"""The stages that checks judge, in order, and the exceptions for a check that fails or does not apply."""

from __future__ import annotations

STAGES = (
    "rows", "batches", "model", "gradient", "clipping", "schedule", "update", "side-effects", "persistence", "outcome",
)  # fmt: skip


class CheckFailed(AssertionError):
    """The claim does not hold; the message states what was found, where, and what was expected.

    Args:
        message: The failure in words.
        cause: The cause, if the numbers show it; checks with the same cause are reported together.
    """

    def __init__(self, message: str, *, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


class NotApplicable(Exception):
    """The claim does not apply to this subject or could not be judged; the message states why."""
