"""The sets of conversations that checks train on, by purpose."""

from __future__ import annotations

import json
from typing import Any

from glm4ft.data.inputs import DEMO_DATA

Conversations = list[dict[str, Any]]


def all_conversations() -> dict[str, Conversations]:
    """Every set of conversations by its name, in the form that ``train`` accepts."""
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
