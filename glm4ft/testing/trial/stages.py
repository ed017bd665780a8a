"""The stages of a training step, in order, and the two outcomes of a check that is not passed."""

from __future__ import annotations

STAGES = (
    "rows", "batches", "model", "gradient", "clipping", "schedule", "update", "side-effects", "persistence", "outcome",
)  # fmt: skip


class CheckFailed(AssertionError):
    """A claim does not hold; the message says what was found, where, and what was expected."""


class NotApplicable(Exception):
    """The claim says nothing about this subject; the message says why."""
