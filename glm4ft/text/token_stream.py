"""Text of a generation as it comes, token by token, in pieces that are safe to print one after the other."""

from __future__ import annotations

import re
from typing import Any

from glm4ft.text.safe_text import TAB
from glm4ft.text.token_text import TokenDecoder

# What may become a command to a CI runner once more text follows: see safe_text.visible.
_UNDECIDED = re.compile(r"(?:\A|\n)[^\S\n]*:?\Z|##?\w*\Z")
_MAX_BYTES = 4  # of one character in UTF-8; as many tokens at most


class TokenStream:
    """Decodes tokens one by one; what cannot be judged yet is kept back until the next one.

    Args:
        tokenizer: A byte-level BPE tokenizer of transformers; its added tokens are shown by their names.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decoder = TokenDecoder(tokenizer)
        self._ids: list[int] = []  # that do not make whole characters yet
        self._text = ""  # decoded, but not shown yet
        self._is_line_start = True

    def push(self, token_id: int) -> str:
        """Take one more token.

        Args:
            token_id: The id.
        Returns:
            What can be printed now; newlines and tabs are themselves.
        """
        self._ids.append(token_id)
        texts = [unit.text for unit in self._decoder.units(self._ids)]
        is_whole = not any("\udc80" <= char <= "\udcff" for char in texts[-1])
        if not is_whole and len(self._ids) < _MAX_BYTES:
            return ""
        self._text += "".join(texts)
        self._ids = []
        pattern_start = self._text if self._is_line_start else "x" + self._text
        return "" if _UNDECIDED.search(pattern_start) else self._show()

    def flush(self) -> str:
        """End the text: what was kept back."""
        self._text += "".join(unit.text for unit in self._decoder.units(self._ids))
        self._ids = []
        return self._show()

    def _show(self) -> str:
        # a character before the text, or else it would be judged as the start of a line
        lead = "" if self._is_line_start else "x"
        lines = (lead + self._text).split("\n")
        shown = "\n".join(self._decoder.show(line, newlines=False).replace(TAB, "\t") for line in lines)
        self._is_line_start = self._text.endswith("\n") or (self._is_line_start and not self._text)
        self._text = ""
        return shown.removeprefix(lead)
