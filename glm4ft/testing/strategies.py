"""Hypothesis strategies for conversations that the data reader accepts, with text that breaks encoders.

Every drawn value is legal, so a test needs no ``assume``. By default the whole legal domain is drawn; keywords narrow
it. The simplest conversation is one user message "a" and one reply "a". Usage errors are raised when a value is drawn,
as in Hypothesis itself.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import SearchStrategy

from glm4ft.data.conversation import Conversation, Message, Role
from glm4ft.data.written_calls import find_written_calls

# Control tokens of the whole GLM-4 family, including those that only GLM-4.5 has.
MARKERS = (
    "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|endoftext|>", "[gMASK]", "<sop>", "[gMASK]<sop>",
    "[MASK]", "[sMASK]", "<eop>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
MARKER_LOOK_ALIKES = ("<|tool|>", "<|user", "|>", "< |user|>", "<|USER|>", "[gMASK", "<|im_end|>", "</s>", "/nothink")
_WHITE_SPACE = (
    " ", "\n", "\n\n", "  ", "\t", "\r\n", "\r\n\r\n", "\r", " \n ", "\n  \n", "    ", "\x0b", "\x0c", "\x85", "\xa0",
    "\u2028", "\u2029", "\u3000",
)  # fmt: skip
_TEXTS = (
    "a", "b", "Hello, world!", "It's 42 degrees", "法国的首都是巴黎。", "你好！", "日本語", "한국어", "नमस्ते",
    "\U0001f44d", "\U0001f44d\U0001f3fd", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7",  # emoji
    "e\u0301", "\u0301", "Z\u0351\u036b\u0343", "\ufb01", "\u1100\u1161\u11a8",  # combining, and what NFKC would change
    "שלום", "مرحبا", "\u202eabc\u202c", "\u2066x\u2069", "\u200f",  # right to left, bidi controls
    "\ufeff", "\u200b", "\xad", "\x00", "\x1b[31m", "\x7f", "\ufffd", "\U0010ffff",  # invisible or not a character
    '{"city": "Beijing"}', '{"城市": ["北京", null]}', "[]", '": "', "\\n", "```python\nprint(1)\n```", "::error::x",
    "None", "{{ x }}", "{% endif %}", "&lt;b&gt;", "a" * 300, "the weather in Paris " * 60, "长" * 200, " " * 100,
)  # fmt: skip
BUILT_IN_TOOLS = ("python", "simple_browser", "cogview")


def text_contents() -> SearchStrategy[str]:
    """Non-empty texts of a message: many scripts, all kinds of white space, JSON, markers and look-alikes of markers.

    Returns:
        A strategy for strings that UTF-8 can encode, from one character to a few thousand.
    """
    return _joined((*_WHITE_SPACE, *MARKER_LOOK_ALIKES, *MARKERS))


def marker_free_contents(*, markers: Iterable[str] = MARKERS) -> SearchStrategy[str]:
    """The texts of ``text_contents`` without markers, so that no chat template turns them into control tokens.

    Args:
        markers: The strings that must not occur.

    Returns:
        A strategy for strings without any of the markers.
    """
    unwanted = tuple(markers)
    return _joined((*_WHITE_SPACE, *MARKER_LOOK_ALIKES)).filter(lambda text: not _holds(text, unwanted))


def tool_names(contents: SearchStrategy[str] | None = None) -> SearchStrategy[str]:
    """Names of tools: identifiers, and any other text of one line that is not blank.

    Args:
        contents: The strategy for the other text; by default ``text_contents()``.

    Returns:
        A strategy for strings that fit on the line of a GLM-4 header.
    """
    common = st.sampled_from(["f", "g", "get_weather", "search-web", "查询天气", "a.b"])
    return common | _contents(contents).map(_first_line).filter(bool)


def tool_definitions(
    contents: SearchStrategy[str] | None = None,
    *,
    names: SearchStrategy[str] | None = None,
    built_in: bool | None = None,
) -> SearchStrategy[dict[str, Any]]:
    """Declared tools, in the form that the data reader returns.

    Args:
        contents: The strategy for descriptions; by default ``text_contents()``.
        names: The strategy for names of functions; by default ``tool_names(contents)``.
        built_in: True for only the built-in tools of glm-4-9b-chat, False for only functions, None for both.

    Returns:
        A strategy for objects with ``type`` and, for a function, ``function``.
    """
    texts = _contents(contents)
    values = st.sampled_from([0, -1, 0.1, 1e300, True, {}, {"a": [None]}]) | texts
    parameters = st.fixed_dictionaries(
        {"type": st.just("object")}, optional={"required": st.just(["x"]), "日期": values}
    )
    functions = st.fixed_dictionaries(
        {"name": tool_names(texts) if names is None else names},
        optional={"description": texts, "parameters": parameters},
    ).map(lambda function: {"type": "function", "function": function})
    typed: SearchStrategy[dict[str, Any]] = st.sampled_from(BUILT_IN_TOOLS).map(lambda kind: {"type": kind})
    return typed if built_in else functions if built_in is False else functions | typed


def tool_calls(
    contents: SearchStrategy[str] | None = None,
    *,
    names: SearchStrategy[str] | None = None,
    loss: bool | None = None,
) -> SearchStrategy[Message]:
    """Assistant messages that call a tool, with JSON or any other text (such as code) as arguments.

    Args:
        contents: The strategy for texts within the arguments; by default ``text_contents()``.
        names: The strategy for names of tools; by default ``tool_names(contents)``.
        loss: The loss flag of the messages; None for either.

    Returns:
        A strategy for messages whose ``metadata`` is not empty.
    """
    texts = _contents(contents)
    arguments = st.just("{}") | st.dictionaries(st.sampled_from(["x", "城市"]), texts).map(_as_json) | texts
    return st.builds(
        lambda name, text, flag: Message("assistant", text, name, flag),
        tool_names(texts) if names is None else names,
        arguments,
        _flags(loss),
    )


@st.composite
def conversations(
    draw: st.DrawFn,
    contents: SearchStrategy[str] | None = None,
    *,
    min_turns: int = 1,
    max_turns: int = 6,
    tools: bool | None = None,
    system: bool | None = None,
    late_system: bool = True,
    trailing: bool | None = None,
    loss: bool | None = None,
    nonstop_terminators: bool = False,
) -> Conversation:
    """Conversations with any order of roles that the reader accepts and every chat format can encode.

    Args:
        draw: The function that Hypothesis passes to draw values.
        contents: The strategy for every text in a conversation; by default ``text_contents()``.
        min_turns: The smallest number of assistant messages, at least 1.
        max_turns: The largest number of assistant messages.
        tools: True if tools are declared, and perhaps called; False if not; None for either.
        system: True if the conversation begins with system messages, False if not, None for either.
        late_system: Whether system messages may also come later; directly after an assistant message only with
            ``nonstop_terminators``.
        trailing: True if messages follow the last assistant message, False if not, None for either.
        loss: The loss flag of all assistant messages; None for any mixture.
        nonstop_terminators: Whether an assistant message may be followed by an assistant or a system message, whose
            header is not a stop token. Chat formats refuse that by default.

    Returns:
        A strategy for conversations with ``min_turns`` to ``max_turns`` assistant messages.
    """
    if not 1 <= min_turns <= max_turns:
        raise InvalidArgument(f"1 <= min_turns <= max_turns is needed, not {min_turns=}, {max_turns=}")
    contents = _contents(contents)
    rules = _Rules(max_turns, late_system, nonstop_terminators, may_open=system is not False)
    declared = draw(_optional(_declared(contents), tools))
    may_speak_first = draw(st.sampled_from([False] * 9 + [True]))
    steps = draw(_steps(contents, loss, calls=bool(declared)))
    messages = rules.legalised([_resolved(message, declared) for message in steps], may_speak_first)
    if system and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", draw(contents)))
    while _num_turns(messages) < min_turns:
        if not messages or messages[-1].role in ("assistant", "system"):
            messages.append(Message("user", draw(contents)))
        messages.append(draw(_replies(contents, loss)))
    while trailing is False and messages[-1].role != "assistant":
        messages.pop()
    if trailing and messages[-1].role == "assistant":
        messages.append(Message("user", draw(contents)))
    names = [tool["function"]["name"] if tool["type"] == "function" else tool["type"] for tool in declared]
    if any(_writes_a_call(message, names) for message in messages):
        reject()  # a tool may be called "a", and an answer be "a": the reader takes that for a call
    return Conversation(tuple(messages), tuple(declared))


def _writes_a_call(message: Message, names: list[str]) -> bool:
    is_reply = message.role == "assistant" and not message.is_call
    return is_reply and find_written_calls(message.content, names) is not None


@functools.lru_cache(maxsize=32)
def _steps(contents: SearchStrategy[str], loss: bool | None, calls: bool) -> SearchStrategy[list[Message]]:
    """Messages in any order, in proportions that make every pattern likely after ``_Rules.legalised``.

    Because they are drawn one by one, Hypothesis can remove each message alone when it shrinks; it does not remove an
    exchange of several messages at once. Metadata that is a number stands for a declared tool.
    """
    roles: tuple[Role, ...] = ("user", "system", "observation", "observation")
    contexts = [contents.map(functools.partial(Message, role)) for role in roles]
    replies = [_replies(contents, loss), _replies(contents, loss)]
    numbers = st.integers(0, 3).map(str)
    called = [tool_calls(contents, names=numbers | tool_names(contents), loss=loss) for _ in range(14 * calls)]
    steps = st.lists(st.one_of(contexts[0], *replies, *contexts[1:], *called), max_size=30)
    return st.tuples(steps, steps).map(lambda halves: [*halves[0], *halves[1]])  # one list alone holds 5 on average


@functools.lru_cache(maxsize=32)
def _declared(contents: SearchStrategy[str]) -> SearchStrategy[list[dict[str, Any]]]:
    return st.lists(tool_definitions(contents), min_size=1, max_size=2)


def _replies(contents: SearchStrategy[str], loss: bool | None) -> SearchStrategy[Message]:
    trained = contents.map(lambda text: Message("assistant", text))
    untrained = contents.map(lambda text: Message("assistant", text, loss=False))
    return trained if loss else untrained if loss is False else trained | untrained


def _resolved(message: Message, declared: list[dict[str, Any]]) -> Message:
    """The message, with the name of a declared tool in place of the number that stands for it."""
    if not message.metadata.isdecimal():
        return message
    tool = declared[int(message.metadata) % len(declared)]
    return replace(message, metadata=tool["function"]["name"] if tool["type"] == "function" else tool["type"])


@dataclass(frozen=True)
class _Rules:
    """The rules for which message may follow which, under the options of ``conversations``."""

    max_turns: int
    late_system: bool
    nonstop: bool
    may_open: bool  # whether the conversation may begin with a system message

    def legalised(self, steps: list[Message], may_speak_first: bool) -> list[Message]:
        """Make the order of roles legal: a message in an illegal role gets another one, an illegal call is dropped."""
        messages: list[Message] = []
        for step in steps:
            if self._may_follow(messages, step, may_speak_first):
                messages.append(step)
            elif not step.is_call:  # the text of a call consists of arguments, not of contents
                answers_a_call = bool(messages) and messages[-1].is_call and step.role == "assistant"
                messages.append(Message("observation" if answers_a_call else "user", step.content))
        return messages

    def _may_follow(self, messages: list[Message], step: Message, may_speak_first: bool) -> bool:
        before = messages[-1].role if messages else "system"
        is_opening = all(message.role == "system" for message in messages)
        if step.role == "observation":
            return before in ("assistant", "observation")
        if step.role == "system" and is_opening:
            return self.may_open
        if step.role == "system":
            return self.late_system and (self.nonstop or before != "assistant")
        if step.role == "assistant":
            is_asked = not is_opening or may_speak_first
            return is_asked and (self.nonstop or before != "assistant") and _num_turns(messages) < self.max_turns
        return True


def _num_turns(messages: list[Message]) -> int:
    return sum(message.role == "assistant" for message in messages)


def _optional(parts: SearchStrategy[list[Any]], wanted: bool | None) -> SearchStrategy[list[Any]]:
    nothing: SearchStrategy[list[Any]] = st.just([])
    return parts if wanted else nothing if wanted is False else nothing | parts


def _flags(wanted: bool | None) -> SearchStrategy[bool]:
    return st.sampled_from([True, False]) if wanted is None else st.just(wanted)


@functools.cache
def _joined(odd: tuple[str, ...]) -> SearchStrategy[str]:
    """Single fragments, and fragments joined with free text, so that odd text occurs at every position."""
    fragments = st.sampled_from(_TEXTS) | st.sampled_from(odd)
    return fragments | st.lists(fragments | st.text(min_size=1, max_size=6), min_size=1, max_size=5).map("".join)


def _contents(contents: SearchStrategy[str] | None) -> SearchStrategy[str]:
    return text_contents() if contents is None else contents


def _holds(text: str, markers: Iterable[str]) -> bool:
    return any(marker in text for marker in markers)


def _first_line(text: str) -> str:
    """The first line if it can name a tool, else ""; the reader refuses blank names and names with line breaks."""
    line = (text.splitlines() or [""])[0]
    return line if line.strip() else ""


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
