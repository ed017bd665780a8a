"""Decodes token ids to text that is safe to show: whole characters, names of control tokens, undecodable bytes."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from glm4ft.text.safe_text import visible, visible_characters


@dataclass(frozen=True)
class Unit:
    """The fewest neighbouring tokens that together decode to whole characters; a control token is a unit of its own.

    Args:
        start: The first position.
        end: One past the last position.
        text: The decoded text, or the name of the control token.
        is_control: True for a control token.
    """

    start: int
    end: int
    text: str
    is_control: bool


class TokenDecoder:
    """Decodes the tokens of a byte-level BPE tokenizer, byte by byte.

    Args:
        tokenizer: A tokenizer of transformers; its added tokens are the control tokens.
        cues: Further strings that have a meaning where the text is shown, and which text must not imitate.
    """

    def __init__(self, tokenizer: Any, *, cues: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._control = {i: name for name, i in tokenizer.get_added_vocab().items()}
        self.reserved = (*cues, *self._control.values())

    def units(self, ids: Sequence[int], start: int = 0) -> Iterator[Unit]:
        """Group neighbouring tokens until their bytes form whole characters; other bytes become surrogates."""
        decoder, text, first, end = _Utf8Decoder("surrogateescape"), "", start, start + len(ids)
        for position, (token_id, token) in enumerate(zip(ids, self._names(ids), strict=True), start):
            name = self._control.get(token_id) or (f"<id {token_id}>" if token is None else None)
            if name is None:
                text += decoder.decode(_token_bytes(token or ""))
                if not decoder.getstate()[0]:
                    yield Unit(first, position + 1, text, False)
                    text, first = "", position + 1
                continue
            if first < position:
                yield Unit(first, position, text + decoder.decode(b"", final=True), False)
            yield Unit(position, position + 1, name, True)
            decoder, text, first = _Utf8Decoder("surrogateescape"), "", position + 1
        if first < end:
            yield Unit(first, end, text + decoder.decode(b"", final=True), False)

    def show(self, text: str, *, newlines: bool = True) -> str:
        r"""Make decoded text safe to print; a byte that is not part of a whole character is shown as ``\xe5``."""
        return _bytes_alone(visible(text, newlines=newlines, reserved=self.reserved))

    def show_units(self, units: Sequence[Unit]) -> list[str]:
        """Make neighbouring units safe to print side by side; no text imitates a control token."""
        shown: list[str] = []
        for is_control, group in itertools.groupby(units, key=lambda unit: unit.is_control):
            texts = [unit.text for unit in group]
            if is_control:
                shown += [visible(text, newlines=False) for text in texts]
                continue
            characters = iter(visible_characters("".join(texts), reserved=self.reserved))
            shown += [_bytes_alone("".join(itertools.islice(characters, len(text)))) for text in texts]
        return shown

    def show_token(self, token_id: int, position: int, unit: Unit) -> str:
        """Format one token for a table: a control token's name, quoted text, or the bytes of a partial character."""
        if unit.is_control:
            return visible(unit.text, newlines=False)
        if unit.end - unit.start == 1:
            return f"'{self.show(unit.text, newlines=False)}'"
        own = _token_bytes(self._names([token_id])[0] or "").decode("utf-8", "surrogateescape")
        place = f"{position - unit.start + 1} of {unit.end - unit.start}"
        return f"'{self.show(own, newlines=False)}' ({place}: {self.show(unit.text, newlines=False)})"

    def _names(self, ids: Sequence[int]) -> list[str | None]:
        return list(self._tokenizer.convert_ids_to_tokens(list(ids)))


# The symbol of each byte in byte-level BPE: the byte's own character if it can be drawn, otherwise the characters from
# 256 on in order, as in GPT-2's encoder, which every byte-level tokenizer follows.
_DRAWN_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHER_BYTES = (byte for byte in range(256) if byte not in _DRAWN_BYTES)
_BYTE_SYMBOLS = {chr(byte): byte for byte in _DRAWN_BYTES} | {chr(256 + n): b for n, b in enumerate(_OTHER_BYTES)}
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


def _bytes_alone(shown: str) -> str:
    return re.sub(r"\\udc([89a-f][0-9a-f])", r"\\x\1", shown)


def _token_bytes(token: str) -> bytes:
    if not _BYTE_SYMBOLS.keys() >= set(token):
        return token.encode("utf-8", "surrogatepass")  # not from a byte-level vocabulary, so read as plain text
    return bytes(_BYTE_SYMBOLS[symbol] for symbol in token)


def token_text(decoder: TokenDecoder, token: int) -> str:
    """Format one token so that it is safe to print on one line."""
    return "".join(
        decoder.show(unit.text, newlines=False) if not unit.is_control else unit.text for unit in decoder.units([token])
    )
