"""Makes text from anywhere safe in Markdown.

It becomes a code span, or prose in which every character that Markdown, HTML or a CI runner could interpret is a
character reference.
"""

from __future__ import annotations

import re

from glm4ft.text.safe_text import visible

# Characters that Markdown or HTML could interpret; full stops and colons only where they could be part of an address.
_ACTIVE = re.compile(r"[!\"#$&*+;<=>?@\[\\\]^_`{|}~-]|[.:](?=[^\s\d])")


def prose(text: str) -> str:
    """Escape text so that it reads the same, but no Markdown or HTML in it is interpreted."""
    return _ACTIVE.sub(lambda match: f"&#{ord(match[0])};", visible(text, newlines=False))


def code(text: str, *, in_table: bool = False) -> str:
    """Format text as a code span; in a table ``|`` is escaped, since it would end the cell."""
    shown = visible(text, newlines=False)
    shown = shown.replace("|", "\\|") if in_table else shown
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}"
