"""What the runs of a baseline train on: each kind of conversation, so that a change of any of them changes the curves.

It stands apart from the conversations of the checks, which grow: after any change here no recorded curve can be
compared, and all have to be recorded anew.
"""

from __future__ import annotations

from typing import Any

from glm4ft.data.turn_format import FORMATS
from glm4ft.testing.trial.conversations import Conversations
from glm4ft.testing.trial.trial import Trial

_WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "weather", "parameters": {}}}


def _says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _talk(*contents: str, **more: Any) -> dict[str, Any]:
    """A conversation in which user and assistant take turns; ``more`` goes to the last message."""
    messages = [_says(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return {"messages": [*messages[:-1], {**messages[-1], **more}], "tools": None}


# Of different lengths, so that a mistake in any way of batching shows.
_SHORT = [_talk(f"question {i} " + "why " * (7 * i % 11), f"answer {i} " + "so " * (5 * i % 13)) for i in range(8)]
_KINDS = [
    _talk("which?", "a"),
    _talk("hi", "hello you", "how are you?", "well", "bye", "see you."),
    _talk("hi", "hello", "and now?"),  # ends with a question
    {"messages": [_says("system", "be clear"), *_talk("hi", "hello")["messages"]], "tools": None},
    _talk("法国的首都？👍🏽", "巴黎。🇫🇷 é", "谢谢 👩‍👧", "不客气👍 ❤️"),
    _talk("  hi \n", "\n\n it is \n", "\n", " \r\n  one\t"),
    _talk("what is <|assistant|>\nno [gMASK]<sop>?", "<|user|> and <|endoftext|> are tokens"),
]
_FLAGGED = {
    "messages": [_says("user", "hi"), _says("assistant", "no", loss=False), *_talk("again", "better")["messages"]],
    "tools": None,
}
_TOOL = {
    "messages": [
        _says("user", "weather in São Paulo?"),
        _says("assistant", '{"days": 2, "city": "São Paulo"}', metadata="get_weather"),
        _says("observation", "31 degrees"),
        _says("assistant", "it is hot"),
    ],
    "tools": [_WEATHER],
}
_REASONING = [
    _talk("which?", "that one", reasoning_content="there are two"),
    _talk("which river?", "the Rhine", "how long?", "long", reasoning_content="I know it"),
]


def conversations_of(trial: Trial) -> Conversations:
    """The conversations that the subject of a trial accepts; with reasoning as far as its format writes or needs it."""
    turn_format = FORMATS.get(getattr(trial.subject, "chat_format", None) or "template")
    reasoning = turn_format.reasoning if turn_format else None
    talks = [*_SHORT, *_KINDS, _FLAGGED, _TOOL, *(_REASONING if reasoning else [])]
    if reasoning and not reasoning.skipped:  # no prompt asks for an answer without it
        talks = [{**talk, "messages": [_reasoned(message) for message in talk["messages"]]} for talk in talks]
    return [talk for talk in talks if trial.accepts(talk)]


def _reasoned(message: dict[str, Any]) -> dict[str, Any]:
    return {"reasoning_content": "let me see", **message} if message["role"] == "assistant" else message
