"""Proves that every record is either read whole, verbatim, or refused with its file, line and field.

Run: pytest tests/data/test_reader.py
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.known_keys import LOSS_KEYS
from glm4ft.data.reader import from_messages, parse_conversation
from glm4ft.data.written_calls import find_written_calls
from glm4ft.errors import DataError

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"role": "assistant", "metadata": "f", "content": "{}"}
HALF = "\ud800"


def turns(conversation: Conversation) -> list[tuple[Any, ...]]:
    return [(message.role, message.content, message.metadata, message.loss) for message in conversation.messages]


def refusal(record: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse_conversation(record, line=7, path="chat.jsonl")
    return str(caught.value)


def answered(*messages: Any, **keys: Any) -> dict[str, Any]:
    """Make a record whose given messages follow a valid exchange, so that they hold the only fault."""
    return {"messages": [USER, ASSISTANT, *messages], **keys}


# --- what is read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    id: str
    record: dict[str, Any]
    turns: list[tuple[Any, ...]]
    tools: int = 0


U, A = ("user", "a", "", True), ("assistant", "b", "", True)
OPENAI_CALLS = [
    {"id": "1", "type": "function", "function": {"name": "f", "arguments": ' {"x":  1.0}'}},
    {"id": "2", "type": "function", "function": {"name": "g", "arguments": {"城": "北京", "x": None}}},
]
READ = [
    Read("messages", {"messages": [USER, ASSISTANT]}, [U, A]),
    Read("unknown-keys", {"id": 3, "messages": [USER | {"name": "Li"}, ASSISTANT], "source": "x"}, [U, A]),
    Read("nulls", {"messages": [USER | {"loss": None, "tools": None}, ASSISTANT | {"metadata": None}]}, [U, A]),
    Read("other-shape-null", {"messages": [USER, ASSISTANT], "conversations": None, "prompt": None}, [U, A]),
    Read("whitespace", {"messages": [USER | {"content": " \n"}, ASSISTANT]}, [("user", " \n", "", True), A]),
    Read("user-after-user", {"messages": [USER, USER, ASSISTANT]}, [U, U, A]),
    Read("assistant-first-and-twice", {"messages": [ASSISTANT, ASSISTANT]}, [A, A]),
    Read("text-parts", {"messages": [USER | {"content": [{"type": "text", "text": t} for t in "xy"]}, ASSISTANT]},
         [("user", "xy", "", True), A]),
    Read("glm4-call", {"messages": [USER, CALL, {"role": "observation", "content": "1"}, ASSISTANT], "tools": [TOOL]},
         [U, ("assistant", "{}", "f", True), ("observation", "1", "", True), A], 1),
    Read("tools-on-empty-system", {"messages": [{"role": "system", "content": "", "tools": [TOOL]}, USER, CALL]},
         [U, ("assistant", "{}", "f", True)], 1),
    Read("tools-without-content", {"messages": [{"role": "system", "tools": [TOOL]}, USER, ASSISTANT]}, [U, A], 1),
    Read("tools-twice-but-equal", {"messages": [{"role": "system", "content": "s", "tools": [TOOL]}, USER, ASSISTANT],
                                   "tools": json.dumps([TOOL])}, [("system", "s", "", True), U, A], 1),
    Read("openai-calls-and-text", {"messages": [USER, ASSISTANT | {"tool_calls": OPENAI_CALLS, "weight": 0},
                                                {"role": "tool", "tool_call_id": "1", "content": "1"}, ASSISTANT],
                                   "tools": [TOOL]},
         [U, ("assistant", "b", "", False), ("assistant", ' {"x":  1.0}', "f", False),
          ("assistant", '{"城": "北京", "x": null}', "g", False), ("observation", "1", "", True), A], 1),
    Read("openai-null-content", {"messages": [USER, ASSISTANT | {"content": None, "tool_calls": OPENAI_CALLS[:1]}],
                                 "tools": [TOOL]}, [U, ("assistant", ' {"x":  1.0}', "f", True)], 1),
    Read("openai-legacy", {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [],
                                               "function_call": {"name": "f", "arguments": "{}"}},
                                        {"role": "function", "name": "f", "content": "1"}],
                           "functions": [TOOL["function"]]},
         [U, ("assistant", "{}", "f", True), ("observation", "1", "", True)], 1),
    Read("sharegpt", {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         [("system", "s", "", True), U, A]),
    Read("sharegpt-call", {"system": "", "tools": json.dumps([TOOL]), "conversations": [
        {"from": "user", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "function_response", "value": "1"}, {"from": "chatgpt", "value": "b"}]},
         [U, ("assistant", '{"x": 1}', "f", True), ("observation", "1", "", True), A], 1),
    Read("system-beside-messages", {"system": "s", "messages": [USER, ASSISTANT]}, [("system", "s", "", True), U, A]),
    Read("developer", {"messages": [{"role": "developer", "content": "s"}, USER, ASSISTANT]},
         [("system", "s", "", True), U, A]),
    Read("swift-call", {"messages": [USER, {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
                                     {"role": "tool_response", "content": "1"}, ASSISTANT], "tools": [TOOL]},
         [U, ("assistant", '{"x": 1}', "f", True), ("observation", "1", "", True), A], 1),
    Read("columns-that-say-nothing", {"messages": [USER, ASSISTANT | {"train": None}], "rejected": None, "images": [],
                                      "label": "greeting"}, [U, A]),
    Read("tool-named-in-an-answer", {"messages": [USER, ASSISTANT | {"content": "f is a tool (of mine)"}],
                                     "tools": [TOOL]}, [U, ("assistant", "f is a tool (of mine)", "", True)], 1),
    Read("sharegpt-role-content", {"conversations": [USER | {"from": None, "value": None}, ASSISTANT]}, [U, A]),
    Read("prompt-completion", {"prompt": "a", "completion": "b"}, [U, A]),
    Read("prompt-list", {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT, ASSISTANT | {"loss": 0}]},
         [U, ("assistant", "b", "", False), U, A, ("assistant", "b", "", False)]),
]  # fmt: skip


@pytest.mark.parametrize("case", READ, ids=lambda case: case.id)
def test_each_accepted_shape_becomes_the_canonical_turns(case: Read) -> None:
    conversation = parse_conversation(case.record)
    assert turns(conversation) == case.turns
    assert len(conversation.tools) == case.tools
    assert "ignored" not in " ".join(conversation.warnings)


def test_reasoning_is_read_under_any_of_its_names() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        conversation = parse_conversation({"messages": [USER, ASSISTANT | {key: "r", "reasoning_details": None}]})
        assert [message.reasoning for message in conversation.messages] == ["", "r"]
    parts = parse_conversation({"messages": [USER, ASSISTANT | {"reasoning": [{"type": "text", "text": "r"}]}]})
    assert parts.messages[1].reasoning == "r"


def test_text_and_calls_of_one_message_are_one_turn() -> None:
    """Reasoning belongs to its first part; calls with a role of their own go on with the answer before them."""
    text = ASSISTANT | {"tool_calls": OPENAI_CALLS, "reasoning_content": "r"}
    for message, expected in ((text, ["", "r", "", ""]), (text | {"content": None}, ["", "r", ""])):
        conversation = parse_conversation({"messages": [USER, message], "tools": [TOOL]})
        assert [m.reasoning for m in conversation.messages] == expected
        assert [m.continues for m in conversation.messages] == [False, False, *[True] * (len(expected) - 2)]
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    result = {"role": "tool_response", "content": "1"}
    swift = parse_conversation({"messages": [USER, ASSISTANT, call, call, result, call, ASSISTANT], "tools": [TOOL]})
    assert [m.continues for m in swift.messages] == [False, False, True, True, False, False, False]


LOSS_ON = [True, 1, 1.0, "true", "YES", " on ", "y", "T", "1", None]
LOSS_OFF = [False, 0, 0.0, "false", "No", "off\n", "n", "F", "0", ""]


@pytest.mark.parametrize(("flag", "loss"), [(f, True) for f in LOSS_ON] + [(f, False) for f in LOSS_OFF], ids=repr)
@pytest.mark.parametrize("key", LOSS_KEYS)
def test_every_spelling_of_the_loss_flag_is_honoured(key: str, flag: Any, loss: bool) -> None:
    assert parse_conversation(answered(ASSISTANT | {key: flag})).messages[-1].loss is loss


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (TOOL, TOOL),
        ({"name": "f", "description": None}, {"type": "function", "function": {"name": "f"}}),
        ({"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
        ({"function": {"name": "f"}, "strict": True}, {"type": "function", "function": {"name": "f"}, "strict": True}),
        ({"type": "python", "function": None}, {"type": "python"}),
        (
            {"name": "f", "parameters": {"b": {"enum": [None, 1], "x": None}, "a": None, "c": 1.0}},
            {"type": "function", "function": {"name": "f", "parameters": {"b": {"enum": [None, 1]}, "c": 1.0}}},
        ),
    ],
)
def test_tools_are_normalised_in_order_and_without_null_keys(given: Any, kept: Any) -> None:
    [tool] = parse_conversation(answered(tools=[given])).tools
    assert json.dumps(tool) == json.dumps(kept), "the order of keys counts too"


@pytest.mark.parametrize("nothing", [None, [], "", "[]", "null"], ids=repr)
def test_no_tools_may_be_written_in_many_ways(nothing: Any) -> None:
    assert parse_conversation(answered(tools=nothing)).tools == ()


def test_from_messages_is_the_reader_without_a_file() -> None:
    conversation = from_messages((USER, CALL), tools=(TOOL,))
    assert conversation == Conversation((Message("user", "a"), Message("assistant", "{}", "f")), (TOOL,))
    assert [message.is_call for message in conversation.messages] == [False, True]
    conversation.tools[0]["function"]["name"] = "changed"
    assert TOOL["function"]["name"] == "f", "the conversation must not share the caller's tools"


# --- what is refused ------------------------------------------------------------------------------------------------


IMAGE = {"type": "image_url", "text": "x"}
CUSTOM = {"type": "custom", "function": {"name": "f", "arguments": "{}"}}


def calling(**call: Any) -> dict[str, Any]:
    return answered({"role": "assistant", "tool_calls": [{"function": call}]}, tools=[TOOL])


REFUSED: dict[str, tuple[Any, str, str]] = {  # id: record, where in it, words of the message
    "not-an-object": (["x"], "chat.jsonl:7", "not an object"),
    "no-shape": ({"city": "x", "size": 3}, "'city', 'size'", "no known shape"),
    "two-shapes": ({"messages": [], "prompt": "a", "completion": "b"}, "'prompt', 'completion'", "several shapes"),
    "messages-null": ({"messages": None}, ": messages", "missing"),
    "messages-text": ({"messages": "a"}, ": messages", "not a list"),
    "messages-empty": ({"messages": []}, ": messages", "empty"),
    "completion-missing": ({"prompt": "a"}, ": completion", "missing"),
    "completion-empty": ({"prompt": "a", "completion": ""}, ": completion", "empty"),
    "completion-list": ({"prompt": "a", "completion": [{"role": "assistant"}]}, ": completion[0].content", "missing"),
    "message-text": (answered("x"), ": messages[2]", "not an object"),
    "role-missing": (answered({"content": "a"}), ": messages[2].role", "no role"),
    "role-unknown": (answered({"role": "asistant"}), ": messages[2].role", "did you mean 'assistant'?"),
    "role-case": (answered({"role": "Assistant"}), ": messages[2].role", "did you mean 'assistant'?"),
    "role-sharegpt": (answered({"role": "GPT"}), ": messages[2].role", "did you mean 'gpt'?"),
    "role-list": (answered({"role": ["user"]}), ": messages[2].role", "unknown role"),
    "from-unknown": ({"conversations": [{"from": "humn"}]}, ": conversations[0].from", "did you mean 'human'?"),
    "from-and-role": ({"conversations": [{"from": "human", "role": "user"}]}, ": conversations[0].from", "two roles"),
    "two-systems": ({"system": "s", "conversations": [{"from": "system", "value": "t"}]}, ": system", "two system"),
    "content-missing": (answered({"role": "user"}), ": messages[2].content", "missing"),
    "content-empty": (answered(USER | {"content": ""}), ": messages[2].content", "empty"),
    "content-number": (answered(USER | {"content": 3}), ": messages[2].content", "not a string"),
    "content-image": (answered(USER | {"content": [IMAGE]}), ": messages[2].content[0]", "not text"),
    "content-part": (answered(USER | {"content": [{"type": "text", "text": 3}]}), "messages[2].content[0]", "not text"),
    "system-empty": (answered({"role": "system", "content": ""}), ": messages[2].content", "empty"),
    "content-half": (answered(USER | {"content": "x" + HALF}), ": messages[2].content", r"'x\ud800'"),
    "tool-half": (answered(tools=[{"name": "f", "d": [HALF]}]), ": tools[0].d[0]", "surrogate"),
    "tool-key-half": (answered(tools=[{"name": "f", HALF: 1}]), ": tools[0]", "surrogate"),
    "loss-two": (answered(ASSISTANT | {"loss": 2}), ": messages[2].loss", "neither true nor false"),
    "loss-maybe": (answered(USER | {"loss": "maybe"}), ": messages[2].loss", "'maybe'"),
    "loss-list": (answered(ASSISTANT | {"weight": [1]}), ": messages[2].weight", "[1]"),
    "loss-twice": (answered(ASSISTANT | {"loss": 1, "weight": 0}), ": messages[2].weight", "disagree"),
    "metadata-on-user": (answered(USER | {"metadata": "f"}), ": messages[2].metadata", "role user"),
    "metadata-number": (answered(CALL | {"metadata": 3}), ": messages[2].metadata", "tool's name"),
    "metadata-newline": (answered(CALL | {"metadata": "f\n"}), ": messages[2].metadata", r"'f\n'"),
    "metadata-blank": (answered(CALL | {"metadata": " "}), ": messages[2].metadata", "blank"),
    "metadata-half": (answered(CALL | {"metadata": HALF}), ": messages[2].metadata", "surrogate"),
    "metadata-and-calls": (answered(CALL | {"tool_calls": OPENAI_CALLS}), ": messages[2].metadata", "twice"),
    "call-without-tools": (answered(CALL), ": messages[2]", "without tools"),
    "call-in-text": (answered(ASSISTANT | {"content": "\nf\n{}"}, tools=[TOOL]), ": messages[2]", "calls a declared"),
    "call-as-code": (answered(ASSISTANT | {"content": "f(x=1)"}, tools=[TOOL]), ": messages[2]", '"metadata": "f"'),
    "call-of-user": (answered(USER | {"tool_calls": OPENAI_CALLS}), ": messages[2].tool_calls", "role user"),
    "calls-object": (answered(ASSISTANT | {"tool_calls": {}}), ": messages[2].tool_calls", "not a list"),
    "calls-both": (answered(ASSISTANT | {"tool_calls": OPENAI_CALLS, "function_call": {}}), "[2].tool_calls", "and"),
    "call-custom": (answered(ASSISTANT | {"tool_calls": [CUSTOM]}), ": messages[2].tool_calls[0].type", "unknown type"),
    "call-nameless": (calling(arguments="{}"), ": messages[2].tool_calls[0].function.name", "None"),
    "call-no-arguments": (calling(name="f"), ": messages[2].tool_calls[0].function.arguments", "missing"),
    "call-nan": (calling(name="f", arguments=float("nan")), "tool_calls[0].function.arguments", "JSON"),
    "sharegpt-call": ({"conversations": [{"from": "function_call", "value": "f()"}]}, "[0].value", "should hold JSON"),
    "no-assistant": ({"messages": [USER]}, ": messages[0]", "no assistant turn"),
    "only-tools": ({"messages": [{"role": "system", "tools": [TOOL]}]}, ": messages[0]", "no assistant turn"),
    "observation-first": ({"messages": [{"role": "tool", "content": "1"}, ASSISTANT]}, ": messages[0]", "follows"),
    "observation-late": (answered(USER, {"role": "tool", "content": "1"}), ": messages[3]", "follows nothing"),
    "reasoning-of-user": (
        answered(USER | {"reasoning_content": "r"}),
        ": messages[2].reasoning_content",
        "no assistant message",
    ),
    "reasoning-twice": (
        answered(ASSISTANT | {"reasoning_content": "r", "thinking": "s"}),
        ": messages[2].thinking",
        "that differ",
    ),
    "reasoning-details": (answered(ASSISTANT | {"reasoning_details": [{}]}), ": messages[2].reasoning_details", "reas"),
    "reasoning-of-record": (answered(reasoning_content="r"), ": reasoning_content", "reasoning stands where no"),
    "preference": (answered(rejected="r"), ": rejected", "holds preference data"),
    "preference-of-swift": (answered(rejected_response="r"), ": rejected_response", "not preference training"),
    "preference-of-trl": ({"prompt": "a", "chosen": "b", "rejected": "c"}, ": chosen", "a preference trainer"),
    "preference-of-kto": (answered(label=False), ": label", "holds preference data"),
    "images": (answered(images=["a.png"]), ": images", "holds media"),
    "audio-of-message": (answered(USER | {"audio": "a.wav"}), ": messages[2].audio", "no eyes or ears"),
    "thinking-as-switch": (answered(ASSISTANT | {"thinking": True}), ": messages[2].thinking", "not a string"),
    "mask": (answered(ASSISTANT | {"mask": 1}), ": messages[2].mask", "rename it to loss"),
    "two-systems-beside-messages": (
        {"system": "s", "messages": [{"role": "system", "content": "t"}, USER, ASSISTANT]},
        ": system",
        "two system prompts",
    ),
    "train-against-loss": (answered(ASSISTANT | {"loss": 1, "train": 0}), ": messages[2].train", "disagree"),
    "tools-late": (answered({"role": "system", "tools": [TOOL]}), ": messages[2].tools", "comes first"),
    "tools-on-user": ({"messages": [USER | {"tools": [TOOL]}, ASSISTANT]}, ": messages[0].tools", "user message"),
    "tools-differ": (answered(tools=[TOOL], functions=[{"name": "g"}]), ": tools", "differ"),
    "tools-object": (answered(tools={"name": "f"}), ": tools", "not a list"),
    "tools-bad-json": (answered(tools="[{]"), ": tools", "should hold JSON"),
    "tools-duplicate-key": (answered(tools='[{"name": "f", "name": "g"}]'), ": tools", "'name' stands twice"),
    "tool-text": (answered(tools=["f"]), ": tools[0]", "not an object"),
    "tool-nameless": (answered(tools=[{"type": "function", "function": {}}]), ": tools[0].function.name", "name"),
    "tool-function-text": (answered(tools=[{"type": "function", "function": "f"}]), ": tools[0].function", "object"),
    "tool-infinite": (answered(tools=[{"name": "f", "m\n": float("inf")}]), r": tools[0].'m\n'", "JSON"),
    "tool-bytes": (answered(tools=[{"name": "f", "x": b"x"}]), ": tools[0].x", "JSON"),
    "tool-type-blank": (answered(tools=[{"type": " "}]), ": tools[0].type", "blank"),
    "tool-odd-key": (answered(tools=[{"name": "f", 1: 2}]), ": tools[0]", "key is not a string"),
}


@pytest.mark.parametrize(("record", "where", "words"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_file_line_field_and_fault(record: Any, where: str, words: str) -> None:
    text = refusal(record)
    assert re.search(r"where: +chat\.jsonl:7(:|$)", text, re.MULTILINE)
    assert where in text
    assert words in text


@pytest.mark.parametrize("wrap", [str, lambda text: [text]], ids=["text", "list"])
def test_what_was_found_is_shown_short_and_escaped(wrap: Any) -> None:
    text = refusal(answered(USER | {"role": wrap("\x1b[31m\u202e" + "x" * 1000)}))
    assert "\\x1b[31m\\u202exx" in text
    assert "\x1b" not in text
    assert all(len(line) < 120 for line in text.splitlines())


def test_deep_nesting_is_refused() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = {"x": deep}
    assert "nested too deeply" in refusal(answered(tools=[{"name": "f", "p": deep}]))
    assert "too deeply" in refusal(answered(tools='[{"name": "f", "p": ' + "[" * 100_000))


# --- warnings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (answered(CALL | {"metadata": "g"}, tools=[TOOL]), "messages[2] calls 'g', which is not among the declared"),
        (answered(USER), "ends with a message of role user: it is context without a target"),
        (answered(USER | {"loss": "yes"}, ASSISTANT), "messages[2]: loss on a user message is ignored"),
        ({"messages": [USER, ASSISTANT | {"loss": False}]}, "no target"),
        (
            {"prompt": [USER, ASSISTANT | {"loss": 1}, USER], "completion": "b"},
            "prompt[1]: loss on a message of the prompt",
        ),
        (answered(prompt="a"), "prompt is ignored: the conversation is read from messages"),
        (answered(query="a"), "query is ignored"),
    ],
)
def test_what_is_probably_not_meant_is_one_warning(record: Any, words: str) -> None:
    [warning] = parse_conversation(record).warnings
    assert words in warning


def test_each_message_knows_where_its_record_holds_it() -> None:
    record = {"messages": [{"role": "system", "tools": [TOOL]}, ASSISTANT | {"tool_calls": OPENAI_CALLS}]}
    conversation = parse_conversation(record, line=2, path="x.jsonl")
    places = [conversation.where(index) for index in range(3)]
    fields = ["messages[1]", "messages[1].tool_calls[0]", "messages[1].tool_calls[1]"]
    assert places == [f"x.jsonl:2: {field}" for field in fields]
    assert (conversation.where(), from_messages([ASSISTANT]).where(0)) == ("x.jsonl:2", "messages[0]")


# --- properties -----------------------------------------------------------------------------------------------------

KEYS = sorted(
    set(re.findall(r"[a-z_]+(?=': )", repr([case.record for case in READ]))) | {"reasoning_content", "weight"}
)
WORDS = ["user", "assistant", "system", "tool", "human", "function_call", "text", "f", "a\nb", "{}", "0", "", HALF]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(WORDS)
OBJECTS = partial(st.dictionaries, st.sampled_from(KEYS), max_size=2)
JSON = SCALARS | st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | OBJECTS(inner), max_leaves=3)
CHANGES = st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.sampled_from(KEYS), JSON), max_size=3)


@st.composite
def damaged_records(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a valid record with up to three changes anywhere, which is closer to valid than arbitrary JSON."""
    record: Any = copy.deepcopy(draw(st.sampled_from(READ)).record)
    for steps, key, value in draw(CHANGES):
        node = record
        for step in steps:
            inner = [
                item for item in (node.values() if isinstance(node, dict) else node) if isinstance(item, (dict, list))
            ]
            node = inner[step % len(inner)] if inner else node
        if isinstance(node, dict):
            node[key] = value
        else:
            node.append(value)
    return record


@settings(max_examples=600, deadline=None)
@given(record=JSON | damaged_records())
@example(record={"messages": [USER, ASSISTANT], "tools": [{"name": "f", "n": 10**5000}]})
def test_any_json_value_is_read_or_refused(record: Any) -> None:
    """No other exception is raised, and each conversation read keeps the rules and can be written as UTF-8."""
    try:
        conversation = parse_conversation(record)
    except DataError:
        return
    assert any(message.role == "assistant" for message in conversation.messages)
    assert all(message.content for message in conversation.messages)
    assert all(isinstance(warning, str) for warning in conversation.warnings)
    json.dumps([turns(conversation), conversation.tools], ensure_ascii=False, allow_nan=False).encode("utf-8")


TEXTS = st.text(min_size=1, max_size=8) | st.sampled_from(["\ufeff \n", "<|user|>", '{"a": "b"}', "\u2028", "😀"])
NAMES = st.text(min_size=1, max_size=5).filter(lambda name: name.strip() and name.splitlines() == [name])
ANSWERS = st.builds(Message, st.just("assistant"), TEXTS, st.just("") | NAMES, st.booleans())
OTHERS = st.builds(Message, st.sampled_from(["system", "user"]), TEXTS)
OBSERVATIONS = st.lists(st.builds(Message, st.just("observation"), TEXTS), max_size=2)
EXCHANGES = st.tuples(st.lists(OTHERS, max_size=2), ANSWERS, OBSERVATIONS).map(lambda g: [*g[0], g[1], *g[2]])


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages = [message for part in draw(st.lists(EXCHANGES, min_size=1, max_size=4)) for message in part]
    names = list(dict.fromkeys(message.metadata for message in messages if message.is_call))
    built_in = draw(st.sets(st.sampled_from(names))) - {"function"} if names else set()
    tools = ({"type": n} if n in built_in else {"type": "function", "function": {"name": n}} for n in names)
    read = (with_object(m) if m.is_call and m.metadata not in built_in else m for m in messages)
    return Conversation(tuple(read), tuple(tools))


def with_object(call: Message) -> Message:
    """Functions take JSON objects; built-in tools such as python take any text."""
    return replace(call, content=json.dumps({"x": call.content}, ensure_ascii=False))


def writes_a_call(conversation: Conversation) -> bool:
    names = [message.metadata for message in conversation.messages if message.is_call]
    replies = [m for m in conversation.messages if m.role == "assistant" and not m.is_call]
    return any(find_written_calls(reply.content, names) for reply in replies)


def as_glm4(message: Message) -> dict[str, Any]:
    loss = {"loss": message.loss} if message.role == "assistant" else {}
    return {"role": message.role, "content": message.content, "metadata": message.metadata, **loss}


def as_openai(message: Message) -> dict[str, Any]:
    if not message.is_call:
        weight = int(message.loss) if message.role == "assistant" else None
        return {"role": message.role.replace("observation", "tool"), "content": message.content, "weight": weight}
    call = {"id": "x", "type": "function", "function": {"name": message.metadata, "arguments": message.content}}
    return {"role": "assistant", "content": None, "tool_calls": [call], "weight": int(message.loss)}


def as_sharegpt(message: Message) -> dict[str, Any]:
    speaker = {"user": "human", "assistant": "gpt"}.get(message.role, message.role)
    loss = {"loss": message.loss} if message.role == "assistant" else {}
    if not message.is_call:
        return {"from": speaker, "value": message.content, **loss}
    call = json.dumps({"name": message.metadata, "arguments": message.content})
    return {"from": "function_call", "value": call, **loss}


WRITERS = {"messages": as_glm4, "openai": as_openai, "conversations": as_sharegpt}


@pytest.mark.parametrize("shape", WRITERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=conversations().filter(lambda conversation: not writes_a_call(conversation)))
def test_writing_and_reading_a_conversation_is_the_identity(shape: str, conversation: Conversation) -> None:
    key = "conversations" if shape == "conversations" else "messages"
    record = {key: [WRITERS[shape](message) for message in conversation.messages], "tools": list(conversation.tools)}
    if shape == "conversations":
        record["tools"] = json.dumps(record["tools"])
        before = (None, *conversation.messages)  # a call with a role of its own goes on with the answer before it
        goes_on = [
            m.is_call and b is not None and b.role == "assistant"
            for b, m in zip(before, conversation.messages, strict=False)
        ]
        messages = [replace(m, continues=g) for m, g in zip(conversation.messages, goes_on, strict=True)]
        conversation = replace(conversation, messages=tuple(messages))
    read = parse_conversation(json.loads(json.dumps(record)))
    assert read == conversation
    undeclared_or_lost = [text for text in read.warnings if " calls " in text or "ignored" in text]
    assert undeclared_or_lost == []


def test_the_module_loads_without_torch() -> None:
    code = "import sys, glm4ft.data.reader; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
