"""The sets of conversations that checks train on, by purpose."""

from __future__ import annotations

import json
from typing import Any

from glm4ft.data.inputs import DEMO_DATA
from glm4ft.testing.specification.turn_text import ALWAYS_THINKS, THINKING_FORMATS

Conversations = list[dict[str, Any]]

LONG = 1050  # words of a long text: more than 1,024, and two of them more than 2,048


def all_conversations(*, with_tools: bool = True, chat_format: str = "") -> dict[str, Conversations]:
    """Every set of conversations by its name, in the form that ``train`` accepts.

    Args:
        with_tools: Whether some of them have tool calls; if not, the two to memorise are in plain text.
        chat_format: The chat format. In one with reasoning, one of the two conversations to memorise has reasoning and
            the other has none, unless it always has.
    """
    short = _short()
    demo = [json.loads(line) for line in DEMO_DATA.read_text("utf-8").splitlines()]
    found = {
        "short": short,
        "demo": demo if with_tools else [talk for talk in demo if not talk.get("tools")] + [_several_turns()[1]],
        "mixed": [*_tool_calls(), *_several_turns()] if with_tools else _several_turns(),
        "silent": [_silent(talk) for talk in short],
        "half-silent": [_silent(talk) if i % 2 else talk for i, talk in enumerate(short)],
        "long": [_long(), short[0]],
    }
    if chat_format in ALWAYS_THINKS:
        return {name: [_thinking(talk) for talk in talks] for name, talks in found.items()}
    if chat_format in THINKING_FORMATS:
        return found | {name: [_thinking(talk) if i % 2 else talk for i, talk in enumerate(found[name])]
                        for name in ("demo", "mixed")}  # fmt: skip
    return found


def _message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _short() -> Conversations:
    """Conversations of different lengths, so that a fault in any way of batching shows."""
    return [
        {
            "messages": [
                _message("user", f"question {i} " + "why " * (7 * i % 11)),
                _message("assistant", f"answer {i} " + "so " * (5 * i % 13)),
            ],
            "tools": None,
        }
        for i in range(8)
    ]


def _long() -> dict[str, Any]:
    """A conversation whose prompt and answer have a thousand tokens each, whatever the tokenizer.

    Losses in chunks, windows of attention and limits of lengths are right for every row that is short enough.
    """
    words = ["the", "and", "of", "to", "in", "is", "it"]  # a token each, with the space before it

    def text(length: int) -> str:
        return " ".join(words[(i * i + i // 7) % len(words)] for i in range(length))

    return {"messages": [_message("user", text(LONG)), _message("assistant", text(LONG + 50))], "tools": None}


def _thinking(conversation: dict[str, Any]) -> dict[str, Any]:
    """A copy of a conversation in which every answer and call has reasoning before it."""
    messages = [
        {**m, "reasoning_content": f"I say {number} of it."} if m["role"] == "assistant" else m
        for number, m in enumerate(conversation["messages"])
    ]
    return {**conversation, "messages": messages}


def _silent(conversation: dict[str, Any]) -> dict[str, Any]:
    """A copy of a conversation in which no assistant message is trained."""
    messages = [{**m, "loss": False} if m["role"] == "assistant" else m for m in conversation["messages"]]
    return {**conversation, "messages": messages}


def _tool_calls() -> Conversations:
    """Two conversations, each with its own tool; the tools share no argument name."""
    return [
        {
            "messages": [
                _message("user", f"which {name}?"),
                _message("assistant", f'{{"{argument}": "here"}}', metadata=name),
                _message("observation", "7"),
                _message("assistant", "seven"),
            ],
            "tools": [{"type": "function", "function": {"name": name, "description": name, "parameters": {
                "type": "object", "properties": {argument: {"type": "string"}}}}}],
        }
        for name, argument in (("get_weather", "city"), ("get_time", "zone"))
    ]  # fmt: skip


def _several_turns() -> Conversations:
    """Two conversations of several turns, one with a system message and a turn that must not be trained."""
    first = [_message("user", "hi"), _message("assistant", "no", loss=False), _message("user", "again")]
    second = [_message("user", "one"), _message("assistant", "two"), _message("user", "three")]
    return [
        {"messages": [_message("system", "be clear"), *first, _message("assistant", "yes")], "tools": None},
        {"messages": [*second, _message("assistant", "four")], "tools": None},
    ]
