"""Hypothesis strategies for conversations: whatever the data reader accepts, with the text that breaks encoders.

Everything drawn is legal, so that a test needs no ``assume``; the widest legal domain is the default and callers
narrow it by keyword. The simplest conversation is one user message "a" and one reply "a". Usage errors are raised
when a value is drawn, as in Hypothesis itself.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import SearchStrategy

from glm4ft.conversation import Conversation, Message, Role

# Control tokens of the whole GLM-4 family, the ones that only GLM-4.5 knows included.
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
    "a", "b", "Hello, world!", "It's 42 degrees", "12345678", "法国的首都是巴黎。", "你好！", "日本語", "한국어", "Привет", "नमस्ते",
    "\U0001f44d", "\U0001f44d\U0001f3fd", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7",  # emoji
    "e\u0301", "\u0301", "Z\u0351\u036b\u0343", "\ufb01", "\u1100\u1161\u11a8",  # combining, and what NFKC would change
    "שלום", "مرحبا", "\u202eabc\u202c", "\u2066x\u2069", "\u200f",  # right to left, bidi controls
    "\ufeff", "\u200b", "\xad", "\x00", "\x1b[31m", "\x7f", "\ufffd", "\U0010ffff",  # invisible or not a character
    '{"city": "Beijing"}', '{"城市": ["北京", null]}', "[]", '": "', "\\n", "```python\nprint(1)\n```", "::error::x",
    "None", "{{ x }}", "{% endif %}", "&lt;b&gt;", "a" * 300, "the weather in Paris " * 60, "长" * 200, " " * 100,
)  # fmt: skip
BUILT_IN_TOOLS = ("python", "simple_browser", "cogview")


def text_contents() -> SearchStrategy[str]:
    """Non-empty text of a message: every script, white space of every kind, JSON, and text that imitates markers.

    Returns:
        Strings that UTF-8 can encode, from one character to a few thousand.
    """
    return _joined((*_TEXTS, *_WHITE_SPACE, *MARKER_LOOK_ALIKES, *MARKERS))


def marker_free_contents(*, markers: Iterable[str] = MARKERS) -> SearchStrategy[str]:
    """As ``text_contents``, but free of markers: what a chat template can render without making control tokens of it.

    Args:
        markers: strings that must not occur.
    Returns:
        Strings without any of them.
    """
    unwanted = tuple(markers)
    return _joined((*_TEXTS, *_WHITE_SPACE, *MARKER_LOOK_ALIKES)).filter(lambda text: not _holds(text, unwanted))


def tool_names(contents: SearchStrategy[str] | None = None) -> SearchStrategy[str]:
    """Names of tools: identifiers, and any other text of one line that is not blank.

    Args:
        contents: where the other text is taken from; by default ``text_contents()``.
    Returns:
        Strings that GLM-4 can write on a header's line.
    """
    common = st.sampled_from(["f", "g", "get_weather", "search-web", "查询天气", "a.b"])
    return common | _contents(contents).map(_first_line).filter(bool)


def tool_definitions(
    contents: SearchStrategy[str] | None = None,
    *,
    names: SearchStrategy[str] | None = None,
    built_in: bool | None = None,
) -> SearchStrategy[dict[str, Any]]:
    """Declared tools, in the form the data reader gives them.

    Args:
        contents: text of descriptions; by default ``text_contents()``.
        names: of functions; by default ``tool_names(contents)``.
        built_in: True for the built-in tools of glm-4-9b-chat only, False for functions only, None for both.
    Returns:
        Objects with ``type`` and, for a function, ``function``.
    """
    texts = _contents(contents)
    values = st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | texts
    schemas = st.fixed_dictionaries(
        {"type": st.sampled_from(["string", "integer", "object"])},
        optional={"description": texts, "default": values, "enum": st.lists(values, max_size=2)},
    )
    parameters = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from(["city", "日期", "x"]), schemas)},
        optional={"required": st.just(["city"])},
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
    """Assistant messages that call a tool, with JSON or any other text (code, say) as arguments.

    Args:
        contents: texts within the arguments; by default ``text_contents()``.
        names: of the tools; by default ``tool_names(contents)``.
        loss: the loss flag; None for either.
    Returns:
        Messages whose ``metadata`` is not empty.
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
    """Conversations of any order of roles that the reader accepts and every chat format can encode.

    Args:
        draw: given by Hypothesis.
        contents: every text in it; by default ``text_contents()``.
        min_turns: fewest assistant messages, at least 1.
        max_turns: most assistant messages.
        tools: True if tools are declared, and perhaps called; False if not; None for either.
        system: True if the conversation begins with system messages, False if not, None for either.
        late_system: whether system messages may stand further down, where an assistant turn has no part in it.
        trailing: True if messages follow the last assistant message, False if not, None for either.
        loss: the loss flag of all assistant messages; None for any mixture.
        nonstop_terminators: whether an assistant message may be followed by an assistant or a system message, whose
            header is not a stop token. Chat formats refuse that by default.
    Returns:
        Conversations with ``min_turns`` to ``max_turns`` assistant messages.
    """
    if not 1 <= min_turns <= max_turns:
        raise InvalidArgument(f"1 <= min_turns <= max_turns is needed, not {min_turns=}, {max_turns=}")
    grammar = _grammar(_contents(contents), late_system, nonstop_terminators, loss)
    declared = draw(_optional(grammar.declared, tools))
    answers = grammar.answers(declared)
    opening = draw(_optional(grammar.opening, system))
    is_asked = draw(st.sampled_from([True] * 7 + [False]))  # rarely, the assistant speaks first
    asking = draw(grammar.asked)  # drawn in any case, so that a conversation without it is no simpler one
    messages = [*opening, *(asking if is_asked else []), draw(answers)]
    exchanges = st.lists(st.tuples(grammar.between, answers), min_size=min_turns - 1, max_size=max_turns - 1)
    for between, answer in draw(exchanges):
        messages += [*between, answer]
    messages += draw(_optional(grammar.trailing, trailing))
    return Conversation(tuple(messages), tuple(declared))


class _Grammar:
    """The parts of a conversation, each a strategy for a list of messages."""

    def __init__(self, contents: SearchStrategy[str], late_system: bool, nonstop: bool, loss: bool | None) -> None:
        roles: tuple[Role, ...] = ("system", "user", "observation")
        systems, users, observations = (contents.map(functools.partial(Message, role)) for role in roles)
        more = st.lists(users | systems if late_system else users, max_size=1)
        self.contents, self.loss = contents, loss
        self.declared = st.lists(tool_definitions(contents), min_size=1, max_size=2)
        self.opening = st.lists(systems, min_size=1, max_size=2)
        self.asked = st.tuples(st.lists(users, min_size=1, max_size=1), more).map(_flat)
        observed = st.tuples(st.lists(observations, min_size=1, max_size=3), more).map(_flat)
        self.trailing = self.asked | observed
        self.between = self.trailing | more if nonstop else self.trailing
        self.replies = st.builds(lambda text, flag: Message("assistant", text, loss=flag), contents, _flags(loss))

    def answers(self, declared: list[dict[str, Any]]) -> SearchStrategy[Message]:
        """Replies, and calls if tools are declared; now and then of a tool that is not."""
        if not declared:
            return self.replies
        names = [tool["function"]["name"] if tool["type"] == "function" else tool["type"] for tool in declared]
        named = st.sampled_from(names)
        return self.replies | tool_calls(self.contents, names=named | named | tool_names(self.contents), loss=self.loss)


_grammar = functools.lru_cache(maxsize=64)(_Grammar)


def _optional(parts: SearchStrategy[list[Any]], wanted: bool | None) -> SearchStrategy[list[Any]]:
    nothing: SearchStrategy[list[Any]] = st.just([])
    return parts if wanted else nothing if wanted is False else nothing | parts


def _flat(parts: Iterable[list[Message]]) -> list[Message]:
    return [message for part in parts for message in part]


def _flags(wanted: bool | None) -> SearchStrategy[bool]:
    return st.sampled_from([True, False]) if wanted is None else st.just(wanted)


@functools.cache
def _joined(fragments: tuple[str, ...]) -> SearchStrategy[str]:
    """Fragments and free text put together, so that white space and markers stand at every place of a text."""
    pieces = st.sampled_from(fragments) | st.text(min_size=1, max_size=6)
    return st.lists(pieces, min_size=1, max_size=5).map("".join)


def _contents(contents: SearchStrategy[str] | None) -> SearchStrategy[str]:
    return text_contents() if contents is None else contents


def _holds(text: str, markers: Iterable[str]) -> bool:
    return any(marker in text for marker in markers)


def _first_line(text: str) -> str:
    """The first line if it can name a tool, else "": the reader refuses blank names and every kind of line break."""
    line = (text.splitlines() or [""])[0]
    return line if line.strip() else ""


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
