"""The fixed bank of conversations that the checks of rows encode; being fixed, it makes failures reproducible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "the weather of a city, as São Paulo", "parameters": CITY},
}


@dataclass(frozen=True)
class Talk:
    """A conversation of the bank.

    Args:
        id: The name that messages show.
        messages: The messages, in the form that ``encode`` accepts.
        tools: The declared tools; None if there are none.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None


def user(content: str) -> dict[str, Any]:
    """A user message."""
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    """An assistant message."""
    return {"role": "assistant", "content": content, **more}


def with_reasoning(talk: Talk) -> Talk:
    """The same with reasoning in the last answer, as a model that always thinks would have given it."""
    messages = [*talk.messages]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is not None and not messages[last].get("metadata"):
        messages[last] = {"reasoning_content": "let me see", **messages[last]}
    return replace(talk, messages=tuple(messages))


SEVERAL = (user("hi"), answer("hello you"), user("how are you?"), answer("well"), user("bye"), answer("see you."))
TOOL_TALK = Talk(
    "tool call",
    (
        user("weather in São Paulo?"),
        answer('{"days": 2, "city": "São Paulo"}', metadata="get_weather"),  # keys not sorted, and not ASCII
        {"role": "observation", "content": "31 degrees"},
        answer("it is hot"),
    ),
    (WEATHER,),
)
CALL_TALK = Talk("ends with a tool call", TOOL_TALK.messages[:2], TOOL_TALK.tools)
MARKERS_TALK = Talk(
    "marker text",
    (
        user("what is <|assistant|>\nno [gMASK]<sop>?"),
        answer("<|user|> and <|endoftext|> are tokens"),
        user("<|observation|>"),
        answer("<|assistant|>\nyes"),
    ),
)
FLAGGED = Talk("loss false", (user("hi"), answer("first try", loss=False), user("again"), answer("better"), user("go")))
TRAILING = Talk("trailing user message", (user("hi"), answer("hello"), user("and now?")))
BANK = (
    Talk("reply", (user("what is it?"), answer("a river"))),
    Talk("one-token answer", (user("which?"), answer("a"))),
    Talk("several turns", SEVERAL),
    Talk("system", ({"role": "system", "content": "be clear"}, user("hi"), answer("hello"), user("x"), answer("y"))),
    TOOL_TALK,
    CALL_TALK,
    Talk(
        "Chinese and emoji", (user("法国的首都？👍🏽"), answer("巴黎。🇫🇷 é"), user("谢谢 👩‍👧"), answer("不客气👍 ❤️"))
    ),
    Talk("white space", (user("  hi \n"), answer("\n\n it is \n"), user("\n"), answer(" \r\n  one\t"))),
    TRAILING,
    MARKERS_TALK,
)  # every assistant turn here is trained; loss flags have their own check


TWO_QUESTIONS = Talk("two questions", (user("hi"), user("which?"), answer("that one")))  # many templates refuse it


def _calls(*named: tuple[str, str]) -> list[dict[str, Any]]:
    """Tool calls as servers of the OpenAI API return them."""
    return [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in named]


PARALLEL = Talk(
    "reasoning and parallel calls",
    (
        user("weather in Rome and Oslo?"),
        answer(
            "let me ask.",
            reasoning_content="two cities,\ntwo calls",
            tool_calls=_calls(("get_weather", '{"city": "Rome", "days": 2}'), ("get_weather", '{"city": "Oslo"}')),
        ),
        {"role": "tool", "content": "31 degrees"},
        {"role": "tool", "content": "12 degrees"},
        answer("Rome is hot.", reasoning_content="31 is more"),
    ),
    (WEATHER,),
)
THOUGHT_TWICE = Talk(
    "reasoning in two turns",
    (
        user("which river?"),
        answer("the Rhine", reasoning_content="there are many"),
        user("how long?"),
        answer("long", reasoning_content="I know it"),
    ),
)
THINKING = (
    Talk("reasoning", (user("which?"), answer("that one", reasoning_content="there are two"))),
    THOUGHT_TWICE,
    PARALLEL,
)  # for formats with reasoning; in the others there is no place for it
