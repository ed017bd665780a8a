"""The chat formats encode known examples token by token, and refuse unusable inputs with a reason.

Run: pytest tests/data/test_chat_format.py  [--glm4ft-tokenizer FOLDER: known answers of the real GLM-4 tokenizer too]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.control_tokens import control_ids, plain_text_tokenizer
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.errors import DataError, ModelError
from glm4ft.model.tiny_tokenizer import CONTROL_TOKENS, tiny_tokenizer
from glm4ft.testing.strategies import marker_free_contents, text_contents

WEATHER = ({"type": "function", "function": {"name": "get_weather"}},)
REPLY = Conversation((Message("user", "hi"), Message("assistant", "hello you")))
CALL = Conversation(
    (
        Message("user", "?"),
        Message("assistant", '{"a": "b"}', "get_weather"),
        Message("observation", "31C"),
        Message("assistant", "hot"),
    )
)


def notation(tokenizer: Any, row: EncodedRow) -> str:
    """Format a row as text, with supervised tokens in brackets and newlines escaped."""
    texts = [tokenizer.decode([token]).replace("\n", "\\n") for token in row.input_ids]
    return " ".join(f"[{text}]" if keep else text for text, keep in zip(texts, row.supervised, strict=True))


# --- known rows -----------------------------------------------------------------------------------------------------

PREFIX = "[gMASK] <sop> "


@pytest.mark.parametrize("name", ["glm-4-9b-chat", "glm-4-0414"])
def test_a_reply_is_supervised_from_newline_to_terminator(name: str) -> None:
    """In the founding bug ``<|assistant|>`` was supervised and ``<|user|>`` was not (zai-org/GLM-4 342)."""
    tokenizer = tiny_tokenizer()
    row = ChatFormat(name, tokenizer).encode(REPLY)
    expected = r"<|user|> \n h i <|assistant|> [\n] [h] [e] [l] [l] [o] [ you] [<|user|>]"
    assert notation(tokenizer, row) == PREFIX + expected


@pytest.mark.parametrize("name", ["glm-4-9b-chat", "glm-4-0414"])
def test_a_call_is_supervised_from_name_to_terminator(name: str) -> None:
    tokenizer = tiny_tokenizer()
    row = ChatFormat(name, tokenizer).encode(CALL)
    call = r'[g] [e] [t] [_] [w] [e] [a] [t] [h] [er] [\n] [{"] [a] [":] [ ] ["] [b] ["}] [<|observation|>]'
    expected = rf"<|user|> \n ? <|assistant|> {call} \n 3 1 C <|assistant|> [\n] [h] [o] [t] [<|user|>]"
    assert notation(tokenizer, row) == PREFIX + expected


def test_labels_are_ids_where_supervised() -> None:
    row = ChatFormat("glm-4-0414", tiny_tokenizer()).encode(REPLY)
    assert row.labels == [-100] * 7 + row.input_ids[7:]


@dataclass(frozen=True)
class Known:
    id: str
    conversation: Conversation
    expected: str
    ids: str


KNOWN = [
    Known(
        "reply",
        REPLY,
        r"<|user|> \n hi <|assistant|> [\n] [hello] [ you] [<|user|>]",
        "151336 198 6023 151337 198 14978 498 151336",
    ),
    Known(
        "call",
        CALL,
        r'<|user|> \n ? <|assistant|> [get] [_weather] [\n] [{"] [a] [":] [ "] [b] ["}] [<|observation|>] '
        r"\n 31 C <|assistant|> [\n] [hot] [<|user|>]",
        "151336 198 30 151337 455 68852 198 4913 64 788 330 65 9204 151338 198 100557 34 151337 198 10617 151336",
    ),
    Known(
        "newlines-join",  # "\n" + "\n" is one token; encoded apart it would be 198 198
        Conversation((Message("user", "\nYou're Coding"), Message("assistant", "\n"))),
        r"<|user|> \n\n You 're  Coding <|assistant|> [\n\n] [<|user|>]",
        "151336 271 2610 2299 47773 151337 271 151336",
    ),
]


@pytest.fixture(scope="module")
def real_format(real_tokenizer: Any) -> ChatFormat:
    return ChatFormat("glm-4-9b-chat", real_tokenizer)


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case.id)
def test_known_rows_of_the_real_tokenizer(real_format: ChatFormat, real_tokenizer: Any, case: Known) -> None:
    """The expected ids are those that GLM-4 was trained on."""
    row = real_format.encode(case.conversation)
    assert notation(real_tokenizer, row) == PREFIX + case.expected
    assert " ".join(map(str, row.input_ids)) == f"151331 151333 {case.ids}"


def test_known_ids_of_the_real_tokenizer(real_tokenizer: Any) -> None:
    """The ids of the text are those that llama.cpp pull request 13099 logs for GLM-4-0414."""
    assert real_tokenizer.encode("You're Coding", add_special_tokens=False) == [2610, 2299, 47773]
    assert real_tokenizer.encode("<think>", add_special_tokens=False) == [13699, 766, 29], "plain text: <th ink >"
    ids = control_ids(real_tokenizer)
    assert [ids[f"<|{role}|>"] for role in ("system", "user", "assistant", "observation")] == [*range(151335, 151339)]
    assert ids["<|endoftext|>"] == 151329


# --- order of messages ----------------------------------------------------------------------------------------------

LATE_SYSTEM = Conversation(
    (
        Message("user", "a"),
        Message("assistant", "b"),
        Message("system", "c"),
        Message("user", "d"),
        Message("assistant", "e"),
    )
)


def test_0414_puts_system_messages_first() -> None:
    row = ChatFormat("glm-4-0414", tiny_tokenizer()).encode(LATE_SYSTEM)
    expected = r"<|system|> \n c <|user|> \n a <|assistant|> [\n] [b] [<|user|>] \n d <|assistant|> [\n] [e] [<|user|>]"
    assert notation(tiny_tokenizer(), row) == PREFIX + expected


def test_9b_chat_keeps_the_order_and_so_refuses_system_after_assistant() -> None:
    with pytest.raises(DataError, match=r"messages\[2\]\.role"):
        ChatFormat("glm-4-9b-chat", tiny_tokenizer()).encode(LATE_SYSTEM)
    lenient = ChatFormat("glm-4-9b-chat", tiny_tokenizer(), allow_nonstop_terminator=True)
    expected = r"<|user|> \n a <|assistant|> [\n] [b] [<|system|>] \n c <|user|> \n d <|assistant|> [\n] [e] [<|user|>]"
    assert notation(tiny_tokenizer(), lenient.encode(LATE_SYSTEM)) == PREFIX + expected


def test_consecutive_assistants_are_refused_with_line_and_message() -> None:
    messages = (Message("user", "a"), Message("assistant", "b"), Message("assistant", "c"))
    with pytest.raises(DataError) as caught:
        ChatFormat("glm-4-0414", tiny_tokenizer()).encode(Conversation(messages, line=3))
    assert caught.value.where == "line 3: messages[2].role"
    assert caught.value.found == "assistant, then assistant"


# --- text stays text ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def plain(tokenizer: Any) -> Any:
    """The tokenizer that encodes message bodies."""
    return plain_text_tokenizer(tokenizer)


@given(text=marker_free_contents())
def test_ordinary_text_keeps_its_ids_without_added_tokens(plain: Any, tokenizer: Any, text: str) -> None:
    assert plain.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, add_special_tokens=False)


@given(text=text_contents())
def test_no_text_becomes_a_control_token(plain: Any, tokenizer: Any, text: str) -> None:
    ids = plain.encode(text, add_special_tokens=False).ids
    assert not set(ids) & set(tokenizer.get_added_vocab().values())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_added_tokens_that_are_not_special_stay_text_too() -> None:
    """GLM-4.5 adds ``<think>`` as not special; the tokenizer's flag ``encode_special_tokens`` would still match it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    row = ChatFormat("glm-4-0414", tokenizer).encode(
        Conversation((Message("user", "<think>"), Message("assistant", "b")))
    )
    assert notation(tokenizer, row).startswith(PREFIX + r"<|user|> \n < t h in k > <|assistant|>")


def test_making_a_format_leaves_the_tokenizer_unchanged() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    ChatFormat("glm-4-0414", tokenizer).encode(CALL)
    assert tokenizer.backend_tokenizer.to_str() == before


# --- tools ----------------------------------------------------------------------------------------------------------


def test_tools_stand_first_in_the_templates_words(chat_format: ChatFormat, tokenizer: Any) -> None:
    """They are in a block of their own before the conversation's system message, and never supervised."""
    conversation = Conversation((Message("system", "s"), *REPLY.messages), WEATHER)
    row = chat_format.encode(conversation)
    header, body, following = row.segments[1:4]
    assert (header.role, header.message, body.message, following.message) == ("system", None, None, 0)
    text = tokenizer.decode(row.input_ids[body.start : body.end], clean_up_tokenization_spaces=False)
    assert text.startswith("\n")
    assert '## get_weather\n\n{\n    "name": "get_weather"\n}' in text
    assert not any(row.supervised[: row.turns[0].start])


def test_tools_without_a_template_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template to render them"):
        ChatFormat("glm-4-0414", tokenizer).encode(Conversation(CALL.messages, WEATHER))


def test_a_template_that_leaves_tools_out_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="does not render tools as this chat format expects"):
        ChatFormat("glm-4-0414", tokenizer).encode(Conversation(CALL.messages, WEATHER))


def test_a_tool_unknown_to_the_real_template_is_refused(real_format: ChatFormat) -> None:
    """The real template renders functions and three built-in tools, and silently drops all others."""
    for kind in ("python", "simple_browser", "cogview"):
        assert real_format.encode(Conversation(CALL.messages, ({"type": kind},)))
    with pytest.raises(ModelError, match="does not render tools"):
        real_format.encode(Conversation(CALL.messages, ({"type": "code_interpreter"},)))


# --- what a format needs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glm-4", "chatml", ""])
def test_an_unknown_format_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ModelError, match="unknown chat format") as caught:
        ChatFormat(name, tiny_tokenizer())
    assert caught.value.expected == "glm-4-9b-chat or glm-4-0414 or glm-z1-0414 or glm-4.5 or glm-4.7 or template"


@pytest.mark.parametrize("missing", ["[gMASK]", "<sop>", "<|observation|>", "<|endoftext|>"])
def test_a_tokenizer_without_a_control_token_is_refused(missing: str) -> None:
    backend = tiny_tokenizer().backend_tokenizer
    stripped = type(backend)(backend.model)
    stripped.add_special_tokens([token for token in CONTROL_TOKENS if token != missing])
    with pytest.raises(ModelError) as caught:
        ChatFormat("glm-4-0414", PreTrainedTokenizerFast(tokenizer_object=stripped))
    assert caught.value.found == f"no {missing}"


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    class Slow:
        name_or_path = "somewhere"

    with pytest.raises(ModelError, match="not a fast tokenizer"):
        plain_text_tokenizer(Slow())  # type: ignore[arg-type]
