"""The strategies draw every legal pattern, nothing illegal, and shrink to the simplest conversation.

Run: pytest tests/testing/test_strategies.py
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument, NoSuchExample
from hypothesis.strategies import SearchStrategy

from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.reader import parse_conversation
from glm4ft.testing.strategies import (
    MARKER_LOOK_ALIKES,
    MARKERS,
    conversations,
    marker_free_contents,
    text_contents,
    tool_calls,
    tool_definitions,
    tool_names,
)

T = TypeVar("T")
LOOK = settings(max_examples=10_000, database=None, derandomize=True, phases=[Phase.generate])
SHRINK = settings(max_examples=1000, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink])


def minimal(strategy: SearchStrategy[T], condition: Callable[[T], bool] = lambda _: True) -> T:
    return find(strategy, condition, settings=SHRINK)


def never_drawn(strategy: SearchStrategy[T], conditions: dict[str, Callable[[T], bool]]) -> set[str]:
    """The names of the conditions that none of up to 10,000 examples meets; drawing stops once all are met."""
    left = dict(conditions)

    def all_are_met(value: T) -> bool:
        for name in [name for name, condition in left.items() if condition(value)]:
            del left[name]
        return not left

    with contextlib.suppress(NoSuchExample):
        find(strategy, all_are_met, settings=LOOK)
    return set(left)


def as_record(conversation: Conversation) -> dict[str, Any]:
    messages = [
        {"role": m.role, "content": m.content, "metadata": m.metadata}
        | ({"loss": m.loss} if m.role == "assistant" else {})
        for m in conversation.messages
    ]
    return {"messages": messages, "tools": list(conversation.tools)}


def letters(conversation: Conversation) -> str:
    """Roles as one word: s, u, o, a reply as r and a call as c."""
    return "".join("c" if m.is_call else "r" if m.role == "assistant" else m.role[0] for m in conversation.messages)


# --- never illegal --------------------------------------------------------------------------------------------------


@given(conversation=conversations(nonstop_terminators=True))
def test_every_conversation_is_one_that_the_reader_accepts_unchanged(conversation: Conversation) -> None:
    assert parse_conversation(as_record(conversation)) == conversation


@st.composite
def narrowings(draw: st.DrawFn) -> dict[str, Any]:
    maybe = st.sampled_from([None, True, False])
    min_turns = draw(st.integers(1, 4))
    options: dict[str, Any] = {name: draw(maybe) for name in ("tools", "system", "trailing", "loss")}
    options |= {name: draw(st.booleans()) for name in ("late_system", "nonstop_terminators")}
    return options | {"min_turns": min_turns, "max_turns": min_turns + draw(st.integers(0, 2))}


@given(options=narrowings(), data=st.data())
def test_every_option_is_obeyed(options: dict[str, Any], data: st.DataObject) -> None:
    conversation = data.draw(conversations(**options))
    word, turns = letters(conversation), [m for m in conversation.messages if m.role == "assistant"]
    assert options["min_turns"] <= len(turns) <= options["max_turns"]
    assert options["tools"] in (None, bool(conversation.tools))
    assert options["system"] in (None, word.startswith("s"))
    assert options["trailing"] in (None, word[-1] not in "rc")
    assert options["loss"] is None or {turn.loss for turn in turns} == {options["loss"]}
    assert options["late_system"] or "s" not in word.lstrip("s")
    nonstop = any(pair[0] in "rc" and pair[1] in "rcs" for pair in pairwise(word))
    assert options["nonstop_terminators"] or not nonstop
    assert "c" not in word or conversation.tools
    parse_conversation(as_record(conversation))


@given(text=marker_free_contents())
def test_marker_free_text_holds_no_marker(text: str) -> None:
    assert text
    assert not any(marker in text for marker in MARKERS)


@given(text=marker_free_contents(markers=["a", "\n"]))
def test_marker_free_text_is_free_of_the_markers_given(text: str) -> None:
    assert text
    assert not {"a", "\n"} & set(text)


@given(text=text_contents())
def test_text_is_never_empty_and_always_utf8(text: str) -> None:
    assert text
    text.encode("utf-8")


@given(conversation=conversations(st.just("x"), tools=True))
def test_given_contents_are_used_for_every_text(conversation: Conversation) -> None:
    calls = {m.content for m in conversation.messages if m.is_call}
    assert {m.content for m in conversation.messages if not m.is_call} <= {"x"}
    assert calls <= {"x", "{}", '{"x": "x"}', '{"城市": "x"}', '{"x": "x", "城市": "x"}', '{"城市": "x", "x": "x"}'}
    assert {tool.get("function", {}).get("description", "x") for tool in conversation.tools} == {"x"}


# --- every pattern --------------------------------------------------------------------------------------------------

PATTERNS = ["^ur$", "^sur", "^ssu", "^s*r", "uur", "usur", "urur", "ru$", "ro$", "ror", "ucor", "coo", "oor", "uco$",
            "uc$", "ucur", "coco", "os", "roru", "^s.*co"]  # fmt: skip


def test_each_pattern_of_roles_occurs() -> None:
    conditions = {p: lambda c, p=p: bool(re.search(p, letters(c))) for p in PATTERNS}
    assert never_drawn(conversations(), conditions) == set()


def test_turns_that_no_stop_token_ends_occur_on_request() -> None:
    conditions = {p: lambda c, p=p: p in letters(c) for p in ("rr", "rc", "cr", "cc", "rs", "cs")}
    assert never_drawn(conversations(nonstop_terminators=True), conditions) == set()


CONVERSATIONS: dict[str, Callable[[Conversation], bool]] = {
    "six-turns": lambda c: sum(m.role == "assistant" for m in c.messages) == 6,
    "loss-flags-that-differ": lambda c: len({m.loss for m in c.messages if m.role == "assistant"}) == 2,
    "tools-that-nobody-calls": lambda c: bool(c.tools) and "c" not in letters(c),
    "call-of-an-undeclared-tool": lambda c: any("not among" in warning for warning in c.warnings),
    "call-of-a-declared-tool": lambda c: "c" in letters(c) and not any("not among" in text for text in c.warnings),
    "built-in-tool": lambda c: {"type": "python"} in c.tools,
    "marker-in-a-tools-name": lambda c: any("<|" in m.metadata for m in c.messages),
    "marker-in-an-observation": lambda c: any("<|" in m.content for m in c.messages if m.role == "observation"),
}


def test_each_kind_of_conversation_occurs() -> None:
    assert never_drawn(conversations(), CONVERSATIONS) == set()


TEXTS: dict[str, Callable[[str], bool]] = {
    "chinese": lambda t: "法国" in t,
    "zwj-emoji": lambda t: "\u200d" in t,
    "combining-first": lambda t: t[0] == "\u0301",
    "right-to-left": lambda t: "ש" in t,
    "bidi-override": lambda t: "\u202e" in t,
    "marker-inside": lambda t: "<|assistant|>" in t[1:-1],
    "prefix": lambda t: "[gMASK]<sop>" in t,
    "think": lambda t: "<think>" in t,
    "newline-first": lambda t: t[0] == "\n" and bool(t.strip()),
    "newlines-first": lambda t: t.startswith("\n\n"),
    "space-first": lambda t: t[0] == " " and bool(t.strip()),
    "newline-last": lambda t: t[-1] == "\n" and bool(t.strip()),
    "white-space-only": lambda t: not t.strip(),
    "crlf": lambda t: "\r\n" in t,
    "carriage-return-last": lambda t: t[-1] == "\r",
    "line-separator": lambda t: "\u2028" in t,
    "json": lambda t: '{"' in t,
    "control-character": lambda t: "\x1b" in t,
    "astral": lambda t: any(ord(c) > 0xFFFF for c in t),
    "long": lambda t: len(t) > 1000,
    "free": lambda t: any(0x20000 < ord(c) < 0x100000 for c in t),
}


def test_each_kind_of_text_occurs() -> None:
    assert never_drawn(text_contents(), TEXTS) == set()


# --- simplest examples ----------------------------------------------------------------------------------------------


def test_the_simplest_conversation_is_one_question_and_one_reply() -> None:
    assert minimal(conversations()) == Conversation((Message("user", "a"), Message("assistant", "a")))


@pytest.mark.parametrize(
    ("strategy", "simplest"),
    [
        (text_contents(), "a"),
        (marker_free_contents(), "a"),
        (tool_names(), "f"),
        (tool_definitions(), {"type": "function", "function": {"name": "f"}}),
        (tool_definitions(built_in=True), {"type": "python"}),
        (tool_calls(), Message("assistant", "{}", "f")),
    ],
)
def test_the_simplest_part_is_short(strategy: SearchStrategy[Any], simplest: Any) -> None:
    assert minimal(strategy) == simplest


def test_a_found_text_shrinks_to_three_messages() -> None:
    """Shrinking removes the messages around the marker and makes the remaining ones trivial."""
    found = minimal(conversations(), CONVERSATIONS["marker-in-an-observation"])
    assert letters(found) in ("uro", "uco")
    assert found.messages[0].content == "a"
    assert found.messages[2].content in (*MARKERS, *MARKER_LOOK_ALIKES)
    assert len(found.tools) <= 1


# --- usage errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [{"min_turns": 0}, {"min_turns": 7}, {"min_turns": 3, "max_turns": 2}], ids=repr)
def test_impossible_bounds_are_an_error_when_drawn(bounds: dict[str, int]) -> None:
    strategy = conversations(**bounds)
    with pytest.raises(InvalidArgument, match="1 <= min_turns <= max_turns"):
        minimal(strategy)
