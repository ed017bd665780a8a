"""In the formats with reasoning, ids are the template's and targets are what the model must sample.

Three references: known rows in notation, the checkpoint's own template, and an oracle that scans ids alone.

Run: pytest tests/data/test_reasoning_masks.py  [--glm4ft-tokenizer FOLDER: with the real tokenizer, to which the
control tokens of GLM-4.5 are added, too]
"""

from __future__ import annotations

import copy
import hashlib
import importlib.resources
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, note, settings
from tokenizers import AddedToken

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.data.format_check import as_template_messages
from glm4ft.data.render import ReasoningTurns
from glm4ft.errors import DataError, ModelError
from glm4ft.model.tiny_tokenizer import CHAT_TEMPLATES, MARKER_TOKENS, tiny_tokenizer
from glm4ft.testing.reasoning_strategies import reasoned_conversations
from glm4ft.testing.specification.mask_oracle import control_ids, find_mistakes, find_turns
from glm4ft.testing.strategies import MARKERS, marker_free_contents

THINKING = ("glm-z1-0414", "glm-4.5", "glm-4.7")
JOINED = ("glm-4.5", "glm-4.7")
# Each example is encoded in up to three formats by up to two tokenizers; the nightly profile keeps its own number.
EXAMPLES = settings(max_examples=max(25, settings.default.max_examples * (settings.default.max_examples >= 1000)))
PLAIN = marker_free_contents(markers=(*MARKERS, *MARKER_TOKENS))


@pytest.fixture(scope="session")
def marked_tokenizer(real_tokenizer: Any) -> Any:
    """The real tokenizer with the tokens that GLM-4.5 has besides, at its ids."""
    tokenizer = copy.deepcopy(real_tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKER_TOKENS])
    return tokenizer


@pytest.fixture(scope="session")
def thinking_formats(request: pytest.FixtureRequest) -> Callable[..., Iterator[ChatFormat]]:
    """Go through the formats on the tiny tokenizer, and on the real one where it is given."""
    from glm4ft.testing.plugin import TOKENIZER

    tokenizers = {("tiny", name): tiny_tokenizer(chat_format=name) for name in THINKING}
    if TOKENIZER.value(request.config):
        for name in THINKING:
            fixture = "marked_tokenizer" if name in JOINED else "real_tokenizer"
            tokenizers["real", name] = copy.copy(request.getfixturevalue(fixture))
            tokenizers["real", name].chat_template = CHAT_TEMPLATES[name]

    def go_through(names: tuple[str, ...] = THINKING, **options: Any) -> Iterator[ChatFormat]:
        for (kind, name), tokenizer in tokenizers.items():
            if name in names:
                note(f"{name}, {kind} tokenizer")
                yield ChatFormat(name, tokenizer, **options)

    return go_through


def notation(row: EncodedRow, tokenizer: Any) -> str:
    """A row as text, with runs of targets in brackets and newlines escaped."""
    text, was = "", False
    for token, keep in zip(row.input_ids, row.supervised, strict=True):
        text += "[" * (keep and not was) + "]" * (was and not keep) + tokenizer.decode([token])
        was = keep
    return (text + "]" * was).replace("\n", "\\n").removeprefix("[gMASK]<sop>")


# --- known rows -----------------------------------------------------------------------------------------------------

THOUGHT = (Message("user", "hi"), Message("assistant", "ho", reasoning="why"))
SILENT = (Message("user", "hi"), Message("assistant", "ho"))
TWICE = (*THOUGHT, Message("user", "so"), Message("assistant", "<think>\nhm\n</think>\n\n yes "))
CALLS = (
    Message("user", "?"),
    Message("assistant", "ask", reasoning="two"),
    Message("assistant", '{"a": "b", "c": [1]}', "f", continues=True),
    Message("assistant", "{}", "g", continues=True),
    Message("observation", "1"),
    Message("observation", "2"),
    Message("assistant", "so", reasoning="sum"),
)
CALL_LAST = (Message("user", "?"), Message("assistant", '{"x": null}', "f"))


@dataclass(frozen=True)
class Known:
    id: str
    format: str
    messages: tuple[Message, ...]
    expected: str
    reasoning: ReasoningTurns = "template"


KNOWN = [
    Known("thought", "glm-4.5", THOUGHT, r"<|user|>\nhi<|assistant|>[\n<think>why</think>\nho<|user|>]"),
    Known("silent", "glm-4.5", SILENT, r"<|user|>\nhi/nothink<|assistant|>\n<think></think>[\nho<|user|>]"),
    Known(
        "twice", "glm-4.5", TWICE,
        r"<|user|>\nhi<|assistant|>\n<think></think>[\nho<|user|>]\nso<|assistant|>"
        r"[\n<think>hm</think>\nyes<|user|>]",
    ),
    Known(
        "none", "glm-4.5", TWICE,
        r"<|user|>\nhi/nothink<|assistant|>\n<think></think>[\nho<|user|>]\nso/nothink<|assistant|>\n<think></think>"
        r"[\nyes<|user|>]", "none",
    ),
    Known(
        "calls", "glm-4.5", CALLS,
        r"<|user|>\n?<|assistant|>[\n<think>two</think>\nask\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>b</arg_value>"
        r"\n<arg_key>c</arg_key>\n<arg_value>[1]</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call><|observation|>]"
        r"\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|assistant|>"
        r"[\n<think>sum</think>\nso<|user|>]",
    ),
    Known(
        "call-last", "glm-4.5", CALL_LAST,
        r"<|user|>\n?/nothink<|assistant|>\n<think></think>[\n<tool_call>f\n<arg_key>x</arg_key>\n"
        r"<arg_value>null</arg_value>\n</tool_call><|observation|>]",
    ),
    Known(
        "switched-off-by-hand", "glm-4.5", (Message("user", "hi/nothink"), SILENT[1]),
        r"<|user|>\nhi/nothink<|assistant|>\n<think></think>[\nho<|user|>]",
    ),
    Known("thought", "glm-4.7", THOUGHT, r"<|user|>hi<|assistant|><think>[why</think>ho<|user|>]"),
    Known("silent", "glm-4.7", SILENT, r"<|user|>hi<|assistant|></think>[ho<|user|>]"),
    Known(
        "twice", "glm-4.7", TWICE,
        r"<|user|>hi<|assistant|></think>[ho<|user|>]so<|assistant|><think>[hm</think>yes<|user|>]",
    ),
    Known(
        "kept", "glm-4.7", TWICE,
        r"<|user|>hi<|assistant|><think>[why</think>ho<|user|>]so<|assistant|><think>[hm</think>yes<|user|>]", "kept",
    ),
    Known(
        "none", "glm-4.7", TWICE,
        r"<|user|>hi<|assistant|></think>[ho<|user|>]so<|assistant|></think>[yes<|user|>]", "none",
    ),
    Known(
        "calls", "glm-4.7", CALLS,
        r"<|user|>?<|assistant|><think>[two</think>ask<tool_call>f<arg_key>a</arg_key><arg_value>b</arg_value>"
        r"<arg_key>c</arg_key><arg_value>[1]</arg_value></tool_call><tool_call>g</tool_call><|observation|>]"
        r"<tool_response>1</tool_response><tool_response>2</tool_response><|assistant|><think>[sum</think>so<|user|>]",
    ),
    Known("thought", "glm-z1-0414", THOUGHT, r"<|user|>\nhi<|assistant|>\n<think>[\nwhy\n</think>\n\nho<|user|>]"),
    Known(
        "twice", "glm-z1-0414", TWICE,
        r"<|user|>\nhi<|assistant|>\nho<|user|>\nso<|assistant|>\n<think>[\nhm\n</think>\n\nyes<|user|>]",
    ),
    Known(
        "trailing", "glm-z1-0414", (*THOUGHT, Message("user", "and")),
        r"<|user|>\nhi<|assistant|>\n<think>[\nwhy\n</think>\n\nho<|user|>]\nand",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: f"{case.format}-{case.id}")
def test_known_rows(case: Known) -> None:
    """What serving sends is context; what the model samples after it, up to the next role's token, is a target."""
    tokenizer = tiny_tokenizer(chat_format=case.format)  # type: ignore[arg-type]
    row = ChatFormat(case.format, tokenizer, reasoning=case.reasoning).encode(Conversation(case.messages))
    assert notation(row, tokenizer) == case.expected


def test_the_published_prompt_of_glm_45(request: pytest.FixtureRequest) -> None:
    """Its 175 ids and their digest were published for GLM-4.5 (PrimeIntellect-ai/renderers).

    The wording of its tool block is the checkpoint's, as trl holds it; where trl is not installed it cannot be had.
    """
    pytest.importorskip("trl", reason="needs trl, whose glm4moe.jinja has the wording of GLM-4.5's tool block")
    tokenizer = copy.copy(request.getfixturevalue("marked_tokenizer"))
    tokenizer.chat_template = (importlib.resources.files("trl") / "chat_templates" / "glm4moe.jinja").read_text("utf-8")
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "Return the weather for a city.", "parameters": city}
    messages = (Message("system", "You are concise."), Message("user", "What is 2+2?"))
    ids = ChatFormat("glm-4.5", tokenizer).prompt(messages, [{"type": "function", "function": function}])
    assert tokenizer.convert_tokens_to_ids("<think>") == 151350
    assert len(ids) == 175
    digest = hashlib.sha256(json.dumps(ids, separators=(",", ":")).encode()).hexdigest()
    assert digest == "fa428da2ac0ee4acded50eb23683a2fc1fa342f4ff557517c60f1674b4c6972c"


# --- properties -----------------------------------------------------------------------------------------------------


def options_of(format_name: str) -> dict[str, Any]:
    return {"always_thinks": format_name == "glm-z1-0414"}


def turns_of(row: EncodedRow, chat_format: ChatFormat, conversation: Conversation) -> Any:
    messages = [{"role": m.role, "loss": m.loss, "continues": m.continues} for m in conversation.messages]
    return find_turns(
        row.input_ids, messages, control_ids(chat_format.tokenizer), chat_format.tokenizer, chat_format.name
    )


@EXAMPLES
@given(conversation=reasoned_conversations())
def test_the_mask_equals_the_oracle(thinking_formats: Any, conversation: Conversation) -> None:
    for chat_format in thinking_formats(JOINED, allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        turns = turns_of(row, chat_format, conversation)
        assert list(find_mistakes(row.input_ids, row.labels, turns, control_ids(chat_format.tokenizer))) == []
        assert row.supervised == row.expected
        assert [(t.message, t.start, t.end) for t in turns] == [(t.message, t.start, t.end) for t in row.turns]


@EXAMPLES
@given(conversation=reasoned_conversations(always_thinks=True))
def test_the_mask_of_a_model_that_always_thinks_equals_the_oracle(
    thinking_formats: Any, conversation: Conversation
) -> None:
    for chat_format in thinking_formats(("glm-z1-0414",), allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        turns = turns_of(row, chat_format, conversation)
        assert list(find_mistakes(row.input_ids, row.labels, turns, control_ids(chat_format.tokenizer))) == []
        assert row.supervised == row.expected


@EXAMPLES
@given(conversation=reasoned_conversations(PLAIN, trailing=False))
def test_ids_equal_the_template(thinking_formats: Any, conversation: Conversation) -> None:
    """GLM-Z1's template deletes all reasoning, so of its rows the prompts alone can be compared."""
    for reasoning in ("template", "kept", "none"):
        for chat_format in thinking_formats(("glm-4.7",) if reasoning == "kept" else JOINED,
                                            allow_nonstop_terminator=True, reasoning=reasoning):  # fmt: skip
            ids = chat_format.encode(conversation).input_ids[:-1]
            shown = conversation if reasoning != "none" else without_reasoning(conversation)
            carries = thinks(shown, everywhere=reasoning == "kept")
            options = {"clear_thinking": False} if reasoning == "kept" else {}
            rendered = chat_format.tokenizer.apply_chat_template(
                as_template_messages(chat_format, shown.messages),
                tools=list(conversation.tools) or None,
                return_dict=False,
                **({} if carries else {"enable_thinking": False}),
                **options,
            )
            assert ids == list(rendered)


def without_reasoning(conversation: Conversation) -> Conversation:
    messages = [replace(m, reasoning="") for m in conversation.messages]
    return replace(conversation, messages=tuple(replace(m, content=m.content.split("</think>")[-1]) for m in messages))


def last_question(conversation: Conversation) -> int:
    """The index of the last user message before the last answer; -1 without one."""
    messages = conversation.messages
    last = max(i for i, m in enumerate(messages) if m.role == "assistant")
    return max((i for i, m in enumerate(messages[:last]) if m.role == "user"), default=-1)


def thinks(conversation: Conversation, *, everywhere: bool) -> bool:
    first = 0 if everywhere else last_question(conversation) + 1
    return any(
        m.reasoning or (m.role == "assistant" and "</think>" in m.content) for m in conversation.messages[first:]
    )


@EXAMPLES
@given(conversation=reasoned_conversations(PLAIN, always_thinks=True))
def test_prompts_equal_the_template(thinking_formats: Any, conversation: Conversation) -> None:
    """Of the whole conversation, as serving sends it to have it continued, thinking or not."""
    for chat_format in thinking_formats(allow_nonstop_terminator=True):
        messages = conversation.messages
        if messages[-1].role == "assistant":
            messages = (*messages, Message("user", "and"))
        for thinking in (True, False) if chat_format.name in JOINED else (True,):
            rendered = chat_format.tokenizer.apply_chat_template(
                as_template_messages(chat_format, messages), tools=list(conversation.tools) or None, return_dict=False,
                add_generation_prompt=True, enable_thinking=thinking,
            )  # fmt: skip
            assert chat_format.prompt(messages, conversation.tools, thinking=thinking) == list(rendered)


@EXAMPLES
@given(conversation=reasoned_conversations(reasoning=True, loss=True))
def test_a_thinking_turn_begins_where_the_prompt_ends(thinking_formats: Any, conversation: Conversation) -> None:
    """The row up to a turn with reasoning is, id by id, the prompt that serving sends to a model that shall think."""
    for chat_format in thinking_formats(JOINED, allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        last_question = max(
            (i for i, m in enumerate(conversation.messages[: row.turns[-1].message]) if m.role == "user"), default=-1
        )
        thinking = [turn for turn in row.turns if turn.message > last_question]
        assert thinking
        for turn in thinking:
            before = conversation.messages[: turn.message]
            assert row.input_ids[: turn.start] == chat_format.prompt(before, conversation.tools)


@EXAMPLES
@given(conversation=reasoned_conversations(reasoning=False, loss=True))
def test_a_silent_turn_begins_where_the_prompt_ends(thinking_formats: Any, conversation: Conversation) -> None:
    """Every turn of a row without reasoning: earlier turns do not change once later ones follow."""
    for chat_format in thinking_formats(JOINED, allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        for turn in row.turns:
            before = conversation.messages[: turn.message]
            assert row.input_ids[: turn.start] == chat_format.prompt(before, conversation.tools, thinking=False)


@EXAMPLES
@given(conversation=reasoned_conversations(loss=True))
def test_no_empty_block_is_trained(thinking_formats: Any, conversation: Conversation) -> None:
    """``<think></think>`` as a target would teach a model to skip thinking (NeMo AutoModel 3738; TRL's template)."""
    for chat_format in thinking_formats(JOINED, allow_nonstop_terminator=True):
        row = chat_format.encode(conversation)
        opened, closed = (chat_format.control_ids.get(t, -1) for t in ("<think>", "</think>"))
        for at, token in enumerate(row.input_ids):
            if token == closed and row.supervised[at]:
                before = row.input_ids[at - 1]
                assert before != opened, f"an empty block ends at {at} and is trained"
                assert before not in chat_format.header_ids.values()


@EXAMPLES
@given(conversation=reasoned_conversations())
def test_control_ids_depend_on_the_structure_alone(thinking_formats: Any, conversation: Conversation) -> None:
    """Every text replaced by a letter gives the same control ids: content never becomes one, nor an image's token."""
    for chat_format in thinking_formats(JOINED, allow_nonstop_terminator=True):
        added = set(chat_format.tokenizer.get_added_vocab().values())
        plain = replace(conversation, messages=tuple(map(_lettered, conversation.messages)))
        found = [[i for i in chat_format.encode(talk).input_ids if i in added] for talk in (conversation, plain)]
        assert found[0] == found[1]


def _lettered(message: Message) -> Message:
    reasoning, content = ("a" if message.reasoning else ""), "a"
    if message.role == "assistant" and "</think>" in message.content and not message.reasoning:
        content = "<think>a</think>a"
    if message.is_call:
        content = json.dumps({f"a{n}": "a" for n in range(len(json.loads(message.content)))})
    if message.role == "user" and message.content.endswith("/nothink"):
        content = "a/nothink"
    return replace(message, content=content, reasoning=reasoning, metadata="a" if message.is_call else "")


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "messages", "words", "field"),
    [
        ("glm-4.5", (SILENT[0], Message("assistant", " \n")), "an answer is blank", "messages[1]"),
        ("glm-4.5", (SILENT[0], Message("assistant", "<think>only</think>")), "an answer is blank", "messages[1]"),
        ("glm-4.5", (SILENT[0], Message("assistant", "a <think>b</think>c")), "cannot be told apart", "messages[1]"),
        ("glm-4.7", (SILENT[0], Message("assistant", "a</think>b</think>c")), "cannot be told apart", "messages[1]"),
        ("glm-4.5", (SILENT[0], Message("assistant", "[1]", "f")), "no object", "messages[1]"),
        ("glm-4.7", (*CALLS[:3], replace(CALLS[3], content="{'a'")), "arguments of a call", "messages[3]"),
        ("glm-z1-0414", SILENT, "no prompt that asks for this turn", "messages[1]"),
        ("glm-z1-0414", CALL_LAST, "no prompt that asks for this turn", "messages[1]"),
        ("glm-z1-0414", (Message("user", "a</think>b"), THOUGHT[1]), "cuts everything before it", "messages[0]"),
        ("glm-4-0414", THOUGHT, "a message holds reasoning", "messages[1]"),
        ("glm-4-9b-chat", THOUGHT, "a message holds reasoning", "messages[1]"),
    ],
)  # fmt: skip
def test_what_a_format_has_no_place_for_is_refused(
    name: Any, messages: tuple[Message, ...], words: str, field: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        ChatFormat(name, tiny_tokenizer(chat_format=name)).encode(Conversation(messages, line=3))
    assert caught.value.where == f"line 3: {field}"


@pytest.mark.parametrize("name", ["glm-4-0414", "glm-z1-0414", "glm-4.5"])
def test_reasoning_is_kept_only_where_serving_can_keep_it(name: Any) -> None:
    with pytest.raises(ModelError, match="cannot be told to keep reasoning"):
        ChatFormat(name, tiny_tokenizer(chat_format=name), reasoning="kept")


def test_a_tokenizer_without_the_markers_is_refused() -> None:
    with pytest.raises(ModelError, match="lacks control tokens") as caught:
        ChatFormat("glm-4.5", tiny_tokenizer())
    assert caught.value.found.startswith("no <think>, </think>, <tool_call>")


@pytest.mark.parametrize(
    ("name", "messages", "told"),
    [
        ("glm-4.5", TWICE, ["messages[1]: its reasoning is not trained"]),
        ("glm-z1-0414", TWICE, ["messages[1] is context only"]),
        ("glm-4-0414", (SILENT[0], Message("assistant", "<think>a</think>b")), ["messages[1] holds reasoning tags"]),
        ("glm-4.7", THOUGHT, []),
    ],
)
def test_what_is_not_trained_is_told(name: Any, messages: tuple[Message, ...], told: list[str]) -> None:
    warnings = ChatFormat(name, tiny_tokenizer(chat_format=name)).warnings(Conversation(messages))
    assert len(warnings) == len(told)
    assert all(text in warning for text, warning in zip(told, warnings, strict=True))


def test_a_tools_text_never_becomes_a_control_token_while_the_templates_example_is_one() -> None:
    tokenizer = tiny_tokenizer(chat_format="glm-4.5")
    added = set(tokenizer.get_added_vocab().values())

    def controls(description: str) -> list[int]:
        tools = ({"type": "function", "function": {"name": "f", "description": description}},)
        row = ChatFormat("glm-4.5", tokenizer).encode(Conversation(SILENT, tools))
        assert description in tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False)
        return [i for i in row.input_ids if i in added]

    assert tokenizer.convert_tokens_to_ids("<arg_key>") in controls("plain")
    assert controls("a <tool_call> and <|user|>, shield") == controls("plain")
