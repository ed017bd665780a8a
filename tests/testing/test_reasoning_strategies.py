"""The strategies for formats with reasoning draw every kind of turn, and nothing that these formats refuse.

Run: pytest tests/testing/test_reasoning_strategies.py
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import Phase, find, given, settings

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation, Message
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.testing.reasoning_strategies import reasoned_conversations

LOOK = settings(max_examples=2000, database=None, derandomize=True, phases=[Phase.generate])
FEW = settings(max_examples=25)
FORMATS = [
    ChatFormat(name, tiny_tokenizer(chat_format=name), allow_nonstop_terminator=True) for name in ("glm-4.5", "glm-4.7")
]
Z1 = ChatFormat("glm-z1-0414", tiny_tokenizer(chat_format="glm-z1-0414"), allow_nonstop_terminator=True)


def answers(conversation: Conversation) -> list[Message]:
    return [message for message in conversation.messages if message.role == "assistant"]


KINDS: dict[str, Callable[[Conversation], bool]] = {
    "reasoning": lambda talk: any(m.reasoning for m in answers(talk)),
    "reasoning in tags": lambda talk: any(m.content.startswith("<think>") for m in answers(talk)),
    "no reasoning": lambda talk: (
        not any(m.reasoning or (not m.is_call and "</think>" in m.content) for m in answers(talk))
    ),
    "reasoning before a call": lambda talk: any(m.reasoning and m.is_call for m in answers(talk)),
    "text before a call": lambda talk: any(
        not a.is_call and b.continues for a, b in zip(talk.messages, talk.messages[1:], strict=False)
    ),
    "three calls": lambda talk: any(
        a.is_call and b.continues and c.continues
        for a, b, c in zip(talk.messages, talk.messages[1:], talk.messages[2:], strict=False)
    ),
    "arguments": lambda talk: any(m.is_call and json.loads(m.content) for m in answers(talk)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_turn_is_drawn(kind: str) -> None:
    assert find(reasoned_conversations(), KINDS[kind], settings=LOOK)


@FEW
@given(talk=reasoned_conversations())
def test_the_formats_encode_whatever_is_drawn(talk: Conversation) -> None:
    for chat_format in FORMATS:
        assert len(chat_format.encode(talk).turns) == chat_format.num_turns(talk)


@FEW
@given(talk=reasoned_conversations(always_thinks=True))
def test_a_model_that_always_thinks_has_reasoning_at_the_end(talk: Conversation) -> None:
    last = answers(talk)[-1]
    assert not last.is_call
    assert last.reasoning or "</think>" in last.content
    Z1.encode(talk)


@FEW
@given(with_it=reasoned_conversations(reasoning=True), without=reasoned_conversations(reasoning=False))
def test_reasoning_is_drawn_as_asked(with_it: Conversation, without: Conversation) -> None:
    first = [message for message in answers(with_it) if not message.continues]
    assert all(message.reasoning or "</think>" in message.content for message in first)
    assert KINDS["no reasoning"](without)
