"""Words and helpers shared by all texts for people."""

from __future__ import annotations

NOTHING_WRONG = ("learnt", "trained")  # verdicts of a diagnosis
# verdicts that name no fault
OPEN_VERDICTS = ("unexplained", "undecided", "still-falling", "memorised", "not-falling", "stopped-by-patience")


def sentence(text: str) -> str:
    """Return the text with a capital at its start and a full stop at its end."""
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."


def number_of(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def percent(part: int, whole: int) -> str:
    """Return a percentage, rounded down so that 100% means all; only zero is shown as 0%."""
    return "<1%" if 0 < part * 100 < whole else f"{part * 100 // max(whole, 1)}%"
