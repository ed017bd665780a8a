"""The conversations that checks train on, by what they are for."""

from __future__ import annotations

import json
from typing import Any

from glm4ft.data.dataset import DEMO_DATA

Conversations = list[dict[str, Any]]


def all_conversations() -> dict[str, Conversations]:
    """Name to conversations, as ``train`` takes them."""
    short = _short()
    return {
        "short": short,
        "demo": [json.loads(line) for line in DEMO_DATA.read_text("utf-8").splitlines()],
        "mixed": [*_tool_calls(), *_several_turns()],
        "silent": [_silent(talk) for talk in short],
        "half-silent": [_silent(talk) if i % 2 else talk for i, talk in enumerate(short)],
    }


def _message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _short() -> Conversations:
    """Of unlike length, so that every way of batching has something to get wrong."""
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


def _silent(conversation: dict[str, Any]) -> dict[str, Any]:
    """The same with nothing to learn."""
    messages = [{**m, "loss": False} if m["role"] == "assistant" else m for m in conversation["messages"]]
    return {**conversation, "messages": messages}


def _tool_calls() -> Conversations:
    """Two tools whose arguments have no name in common, each in a conversation of its own."""
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
    """A system message, and a turn that is not to be trained."""
    first = [_message("user", "hi"), _message("assistant", "no", loss=False), _message("user", "again")]
    second = [_message("user", "one"), _message("assistant", "two"), _message("user", "three")]
    return [
        {"messages": [_message("system", "be clear"), *first, _message("assistant", "yes")], "tools": None},
        {"messages": [*second, _message("assistant", "four")], "tools": None},
    ]
