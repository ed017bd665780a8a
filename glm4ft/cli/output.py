"""What commands print: our own sentences, in which names and values from files may stand."""

from __future__ import annotations

import sys

from glm4ft.errors import harmless


def say(text: str) -> None:
    """Print lines to stdout at once, as harmless text."""
    print(harmless(text), flush=True)


def complain(text: str) -> None:
    """Print lines to stderr, as harmless text."""
    print(harmless(text), file=sys.stderr, flush=True)
