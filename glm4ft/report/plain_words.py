"""What every text for people shares."""

from __future__ import annotations

NOTHING_WRONG = ("learnt", "trained")  # verdicts of a diagnosis
OPEN_VERDICTS = ("unexplained", "still-falling")  # they find no fault


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."
