"""Hypothesis strategies for conversations with reasoning and parallel calls, for the formats that have them.

They are those of ``strategies``, with what only these formats can write: reasoning in a field of its own or in tags,
text and several calls in one turn, and arguments that are JSON objects. Answers are never blank, since these formats
strip them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from glm4ft.data.conversation import Conversation, Message
from glm4ft.testing.strategies import conversations, text_contents

TAGS = ("<think>", "</think>")


def arguments(contents: SearchStrategy[str] | None = None) -> SearchStrategy[str]:
    """Arguments of a call, as JSON objects with values of every type.

    Args:
        contents: The strategy for names and texts; by default ``text_contents()``.
    """
    texts = text_contents() if contents is None else contents
    values = st.sampled_from([0, -1, 0.1, True, None, [], {"a": ["b"]}, [1, {}]]) | texts
    keys = st.sampled_from(["x", "城市", "a_b"]) | texts
    return st.dictionaries(keys, values, max_size=3).map(lambda value: json.dumps(value, ensure_ascii=False))


@st.composite
def reasoned_conversations(
    draw: st.DrawFn,
    /,
    contents: SearchStrategy[str] | None = None,
    *,
    reasoning: bool | None = None,
    always_thinks: bool = False,
    **narrowing: Any,
) -> Conversation:
    """Conversations that a format with reasoning can encode.

    Args:
        draw: The function that Hypothesis passes to draw values.
        contents: The strategy for every text; by default ``text_contents()``.
        reasoning: True if every turn has reasoning, False if none has, None for any mixture.
        always_thinks: Whether the last turn is an answer with reasoning, and no text holds tags, as GLM-Z1 needs.
        narrowing: Keywords of ``conversations``.

    Returns:
        A strategy for conversations.
    """
    texts = text_contents() if contents is None else contents
    if always_thinks:
        texts = texts.filter(lambda text: not any(tag in text for tag in TAGS))
    spoken = texts.filter(lambda text: bool(text.strip()) and TAGS[1] not in text)
    drawn = draw(conversations(texts, **narrowing))
    last = max(index for index, message in enumerate(drawn.messages) if message.role == "assistant")
    messages: list[Message] = []
    for index, message in enumerate(drawn.messages):
        if message.role != "assistant":
            messages.append(message)
            continue
        must_think = always_thinks and index == last
        thinks = reasoning if reasoning is not None and not must_think else must_think or draw(st.booleans())
        thought = draw(spoken) if thinks else ""
        if message.is_call and not must_think:
            messages += _calls(draw, replace(message, reasoning=thought), spoken, texts, is_joined=not always_thinks)
            continue
        answer = replace(message, content=draw(spoken), metadata="")
        in_tags = bool(thought) and TAGS[0] not in thought and draw(st.booleans())
        messages.append(_in_tags(answer, thought) if in_tags else replace(answer, reasoning=thought))
    return replace(drawn, messages=tuple(messages))


def _calls(
    draw: st.DrawFn, call: Message, spoken: SearchStrategy[str], texts: SearchStrategy[str], *, is_joined: bool
) -> Iterator[Message]:
    """One turn with a call: perhaps a text before it, and more calls behind it."""
    call = replace(call, content=draw(arguments(texts)))
    if not is_joined:
        yield replace(call, reasoning="")
        return
    says_something = draw(st.booleans())
    if says_something:
        yield replace(call, content=draw(spoken), metadata="")
        call = replace(call, reasoning="")
    yield replace(call, continues=says_something)
    for _ in range(draw(st.integers(0, 2))):
        yield replace(call, content=draw(arguments(texts)), reasoning="", continues=True)


def _in_tags(message: Message, thought: str) -> Message:
    return replace(message, content=f"{TAGS[0]}{thought}{TAGS[1]}\n\n{message.content}")
