"""Words and helpers shared by all texts for people."""

from __future__ import annotations

NOTHING_WRONG = ("learnt", "trained")  # verdicts of a diagnosis
# verdicts that name no fault
OPEN_VERDICTS = ("unexplained", "undecided", "still-falling", "memorised", "not-falling", "stopped-by-patience")


def sentence(text: str) -> str:
    """Return the text with a capital at its start and a full stop at its end."""
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."
