"""Calls and results are bound as they were meant, and calls in the text of an answer are found, in every spelling.

Run: pytest tests/data/test_calls.py
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4ft.data.conversation import Conversation
from glm4ft.data.read_options import ReadOptions
from glm4ft.data.reader import parse_conversation
from glm4ft.data.written_calls import find_written_calls
from glm4ft.errors import DataError

NAMES = ("find_tram", "f", "g")
TOOLS = [{"type": "function", "function": {"name": name}} for name in NAMES]
USER, ANSWER = {"role": "user", "content": "Tram?"}, {"role": "assistant", "content": "In 3 minutes."}


def call(name: str, call_id: str = "", arguments: Any = "{}") -> dict[str, Any]:
    return {"id": call_id or None, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, **keys: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, **keys}


def asked(calls: list[dict[str, Any]], *after: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": calls}, *after], "tools": TOOLS}


def read(record: Any, **options: Any) -> Conversation:
    return parse_conversation(record, options=ReadOptions(**options))


def results(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages if message.role == "observation"]


@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
def test_results_are_put_into_the_order_of_their_calls(order: tuple[int, ...]) -> None:
    """GLM-4 binds a result by its position; an id that is dropped would bind it to another call."""
    calls = [call(name, f"c{number}") for number, name in enumerate(NAMES)]
    by_id = asked(calls, *(result(f"r{number}", tool_call_id=f"c{number}") for number in order), ANSWER)
    by_name = asked([call(name) for name in NAMES], *(result(f"r{n}", name=NAMES[n]) for n in order), ANSWER)
    for record in (by_id, by_name):
        conversation = read(record)
        assert results(conversation) == ["r0", "r1", "r2"]
        assert conversation.warnings == ()


def test_results_without_ids_keep_their_order() -> None:
    assert results(read(asked([call("f"), call("g")], result("r1"), result("r0"), ANSWER))) == ["r1", "r0"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (asked([call("f", "a")], result("r", tool_call_id="b"), ANSWER), "a result without a call"),
        (asked([call("f", "a")], *[result("r", tool_call_id="a")] * 2, ANSWER), "a call has two results"),
        (asked([call("f", "a"), call("g", "a")], result("r", tool_call_id="a"), ANSWER), "two calls have one id"),
    ],
)
def test_ids_that_do_not_match_are_refused(record: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(record)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (asked([call("f", "a"), call("g", "b")], result("r", tool_call_id="b"), ANSWER),
         "messages[1].tool_calls[0] is a call without a result"),
        (asked([call("f")], USER, ANSWER), "messages[1].tool_calls[0] is a call without a result"),
        (asked([call("f")], result("r"), result("s"), ANSWER), "messages[3] is a result without a call"),
        (asked([call("f")], result("r", name="g"), ANSWER), "is a result of 'g', which was not called"),
        ({"messages": [USER, ANSWER, result("r"), ANSWER]}, "messages[2] is a result without a call"),
    ],
)  # fmt: skip
def test_calls_and_results_that_stand_alone_are_told(record: Any, words: str) -> None:
    assert words in " ".join(read(record).warnings)


def test_a_call_at_the_end_waits_for_no_result() -> None:
    assert read(asked([call("f"), call("g")])).warnings == ()


@pytest.mark.parametrize("arguments", ["{'stop': 'Mill'}", "stop=Mill", "[1]", '"{}"', "{", '{"a": NaN}'])
def test_arguments_that_are_no_json_object_are_told(arguments: str) -> None:
    with pytest.raises(DataError, match="no JSON object"):
        read(asked([call("f", arguments=arguments)]))
    native = {"messages": [USER, {"role": "assistant", "metadata": "f", "content": arguments}], "tools": TOOLS}
    assert "no JSON object" in " ".join(read(native).warnings)
    code = {"messages": [USER, {"role": "assistant", "metadata": "python", "content": arguments}]}
    assert read(code | {"tools": [{"type": "python"}]}).warnings == (), "built-in tools take any text"


MILL = '{"stop": "Mill"}'
WRITTEN = {  # a spelling: the text, what stands before the call, the arguments; None where they cannot be read
    "glm": (f"find_tram\n{MILL}", "", MILL),
    "glm-without-json": ("find_tram\nMill Bridge", "", "Mill Bridge"),
    "glm-no-arguments": ("find_tram", "", "{}"),
    "glm-on-one-line": (f"find_tram {MILL}", "", MILL),
    "glm-fenced": (f"find_tram\n```json\n{MILL}\n```", "", MILL),
    "glm-after-text": (f"Let me look.\nfind_tram\n{MILL}", "Let me look.", MILL),
    "glm-header": (f"<|assistant|>find_tram\n{MILL}", "", MILL),
    "colon": (f"find_tram: {MILL}", "", MILL),
    "brackets": (f"find_tram({MILL})", "", MILL),
    "hermes": ('<tool_call>\n{"name": "find_tram", "arguments": {"stop": "Mill"}}\n</tool_call>', "", MILL),
    "hermes-after-text": (
        'I look.\n<tool_call>{"name": "find_tram", "arguments": {"stop": "Mill"}}</tool_call>', "I look.", MILL),
    "llama-json": ('{"name": "find_tram", "parameters": {"stop": "Mill"}}', "", MILL),
    "llama-tag": (f"<function=find_tram>{MILL}</function>", "", MILL),
    "llama-python": ('[find_tram(stop="Mill")]', "", MILL),
    "python": ('find_tram(stop="Mill")', "", MILL),
    "python-positional": ('find_tram("Mill")', "", None),
    "mistral": ('[TOOL_CALLS] [{"name": "find_tram", "arguments": {"stop": "Mill"}}]', "", MILL),
    "glaive": ("""<functioncall> {"name": "find_tram", "arguments": '{"stop": "Mill"}'}""", "<functioncall>", None),
    "glm-4.5": ("<tool_call>find_tram\n<arg_key>stop</arg_key>\n<arg_value>Mill</arg_value>\n</tool_call>", "", MILL),
    "react": (f"Thought: late\nAction: find_tram\nAction Input: {MILL}", "Thought: late", MILL),
    "openai-in-text": ('{"tool_calls": [{"function": {"name": "find_tram", "arguments": "{}"}}]}', "", "{}"),
    "name-as-key": ('{"find_tram": {"stop": "Mill"}}', "", MILL),
}  # fmt: skip


@pytest.mark.parametrize(("text", "before", "arguments"), WRITTEN.values(), ids=WRITTEN)
def test_a_call_in_an_answer_is_refused_or_read(text: str, before: str, arguments: str | None) -> None:
    record = {"messages": [USER, {"role": "assistant", "content": text}, result("3"), ANSWER], "tools": TOOLS}
    with pytest.raises(DataError, match="calls a declared tool") as caught:
        read(record)
    assert "--calls_in_content true" in caught.value.fix
    if arguments is None:
        with pytest.raises(DataError, match="cannot be read"):
            read(record, calls_in_content=True)
        return
    messages = read(record, calls_in_content=True).messages[1:-2]
    assert [message.content for message in messages[:-1]] == ([before] if before else [])
    assert (messages[-1].metadata, messages[-1].content) == ("find_tram", arguments)


@pytest.mark.parametrize(
    "text",
    [
        "f is a tool (of mine)", "I called find_tram for you.", "find_tram is the tool.", "f (of mine)", "f(x) = 2x",
        'Use `find_tram(stop="Mill")` to get it.', "The find_tram\ntool", '{"name": "Li", "age": 3}', "if",
        'find_tram returns minutes.\nIt takes {"stop": "x"} as its input.', "You can use find_tram: it finds trams.",
    ],
)  # fmt: skip
def test_an_answer_about_a_tool_is_an_answer(text: str) -> None:
    answered = {"messages": [USER, {"role": "assistant", "content": text}], "tools": TOOLS}
    assert read(answered).messages[1].content == text


def test_two_calls_in_one_answer_are_both_read() -> None:
    text = "[find_tram(stop='Mill'), f(x=1)]"
    record = {"messages": [USER, {"role": "assistant", "content": text}], "tools": TOOLS}
    calls = read(record, calls_in_content=True).messages[1:]
    assert [(one.metadata, json.loads(one.content)) for one in calls] == [
        ("find_tram", {"stop": "Mill"}),
        ("f", {"x": 1}),
    ]


@given(text=st.text(alphabet="f{}[]()<>|`\n\"':=, 1a", max_size=40))
def test_any_text_is_a_call_or_not(text: str) -> None:
    """No text takes the search apart, and what is found names a declared tool."""
    found = find_written_calls(text, NAMES)
    assert found is None or all(one.name in NAMES for one in found.calls)
