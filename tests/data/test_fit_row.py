"""Long conversations lose the same turns at a cost that grows with the row, not with what is cut off.

Run: pytest tests/data/test_fit_row.py
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.data.encoding import NO_TARGETS, TOO_LONG, fit_row
from glm4ft.data.reader import from_messages
from glm4ft.errors import DataError
from glm4ft.model.tiny import tiny_tokenizer

TINY_FORMAT = ChatFormat("glm-4-0414", tiny_tokenizer())


def talk(*exchanges: tuple[str, str], system: str = "") -> list[dict[str, str]]:
    turns = [{"role": r, "content": c} for pair in exchanges for r, c in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def by_trying(conversation: Conversation, max_length: int) -> tuple[EncodedRow | None, str]:
    """What ``fit_row`` has to give: all encoded, without ever more of the oldest exchanges until it fits."""
    messages = [m for m in conversation.messages if m.role != "system"]
    system = [m for m in conversation.messages if m.role == "system"]
    for start in range(0, len(messages), 2):
        row = TINY_FORMAT.encode(Conversation((*system, *messages[start:])))
        if len(row.input_ids) <= max_length:
            return (row, "") if any(row.supervised) else (None, NO_TARGETS)
    return None, TOO_LONG


texts = st.builds(lambda text, times: text * times, st.sampled_from(["a", "hi you ", "1", "\n", "x" * 9 + " ", "你好"]),
                  st.sampled_from([1, 3, 20, 400]))  # fmt: skip


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=12), st.sampled_from(["", "be brief", "be brief " * 60]),
       st.integers(5, 120))  # fmt: skip
def test_what_is_cut_is_what_trying_would_cut(exchanges: list[tuple[str, str]], system: str, max_length: int) -> None:
    conversation = from_messages(talk(*exchanges, system=system))
    assert fit_row(conversation, TINY_FORMAT, max_length) == by_trying(conversation, max_length)


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(talk(*[("a", "b")] * 8000), id="many turns"),
        pytest.param(talk(("word and more " * 400_000, "a"), ("b", "c")), id="long message, cut off"),
        pytest.param(talk(("a", "word and more " * 400_000)), id="long message, too long"),
        pytest.param(talk(("a", "b"), system="word and more " * 400_000), id="long system message"),
    ],
)
def test_little_more_is_encoded_than_a_row_holds(messages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding takes 200 bytes of memory for a byte: what cannot be kept is not encoded."""
    num_characters: list[int] = []
    plain = TINY_FORMAT._plain

    class Counting:
        def encode(self, text: str) -> Any:
            num_characters.append(len(text))
            return plain.encode(text)

        def encode_batch_fast(self, texts: list[str]) -> Any:
            num_characters.extend(map(len, texts))
            return plain.encode_batch_fast(texts)

    monkeypatch.setattr(TINY_FORMAT, "_plain", Counting())
    row, reason = fit_row(from_messages(messages), TINY_FORMAT, 1000)
    assert (row is None) == (reason == TOO_LONG)
    assert 0 < sum(num_characters) <= 8 * 1000 + 2000


def test_order_is_checked_in_what_is_cut_off_too() -> None:
    """Or whether a file is refused would depend on the length of its rows."""
    messages = talk(*[("a", "b")] * 200)
    messages.insert(2, {"role": "assistant", "content": "and"})
    for max_length in (100, 10_000):
        with pytest.raises(DataError, match=r"messages\[2\]"):
            fit_row(from_messages(messages), TINY_FORMAT, max_length)
