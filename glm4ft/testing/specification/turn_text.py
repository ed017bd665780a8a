r"""The text that the model samples in an assistant turn, written down independently of any encoder.

Sources: the text script of THUDM/GLM-4; the chat templates of GLM-4.5 and GLM-4.7.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

THINKING_FORMATS = ("glm-z1-0414", "glm-4.5", "glm-4.7")
ALWAYS_THINKS = ("glm-z1-0414",)  # no prompt asks for a turn that begins otherwise


def carries_reasoning(messages: Sequence[Mapping[str, Any]], index: int) -> bool:
    """Whether serving's template renders the reasoning of a turn: that of turns behind the last question.

    Args:
        messages: The messages of the conversation.
        index: The index of the assistant message.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    asked = [i for i, message in enumerate(messages[: answers[-1]]) if message["role"] == "user"]
    return bool(messages[index].get("reasoning_content")) and index > max(asked, default=-1)


def sampled_text(message: Mapping[str, Any], chat_format: str, *, carries: bool) -> str:
    """The text that the model samples in a turn, without its terminator.

    Args:
        message: The assistant message, with ``metadata``, or with ``reasoning_content`` and ``tool_calls``.
        chat_format: The name of the format.
        carries: Whether the turn carries its reasoning.
    """
    reasoning, content = message.get("reasoning_content", ""), message["content"] or ""
    if chat_format not in THINKING_FORMATS:
        return f"{message.get('metadata', '')}\n{content}"
    if chat_format == "glm-z1-0414":
        return f"\n{reasoning}\n</think>\n\n{content.strip()}"
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    if message.get("metadata"):
        calls, content = [(message["metadata"], content)], ""
    answer, gap = content.strip(), "\n" if chat_format == "glm-4.5" else ""
    opened = "\n<think>" if chat_format == "glm-4.5" else ""
    text = f"{opened}{reasoning}</think>" if carries else ""
    return text + gap * bool(answer) + answer + "".join(_call(name, given, gap) for name, given in calls)


def openai_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form of the OpenAI API, with objects as the arguments of calls, as templates want them.

    Args:
        messages: Messages with ``tool_calls`` or ``metadata``, and results of either role.
    Raises:
        json.JSONDecodeError: If the arguments of a call are not valid JSON.
    """
    return [_openai_message(message) for message in messages]


def _openai_message(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    if message.get("metadata"):
        calls = [{"name": message["metadata"], "arguments": message["content"]}]
    decoded = [{"function": {**call, "arguments": json.loads(call["arguments"])}} for call in calls]
    role = "tool" if message["role"] == "observation" else message["role"]
    content = "" if message.get("metadata") else message["content"]
    kept = {key: value for key, value in message.items() if key == "reasoning_content"}
    return {"role": role, "content": content, **kept} | ({"tool_calls": decoded} if decoded else {})


def _call(name: str, arguments: str, gap: str) -> str:
    text = f"{gap}<tool_call>{name}{gap}"
    for key, value in json.loads(arguments).items():
        written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text += f"<arg_key>{key}</arg_key>{gap}<arg_value>{written}</arg_value>{gap}"
    return text + "</tool_call>"
