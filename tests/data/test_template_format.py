"""A checkpoint's own template gives rows and mask, or is refused with the reason.

Run: pytest tests/data/test_template_format.py
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_rows import token_origins, turn_markers
from glm4ft.data.formats import make_format
from glm4ft.data.template_format import TemplateFormat
from glm4ft.errors import DataError, InputError, ModelError
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.testing.bases.chatml_base import CHATML, chatml_tokenizer

TALK = (
    Message("user", "What is it?"), Message("assistant", "The river."),
    Message("user", "  And in the city?"), Message("assistant", "The city.\n"),
)  # fmt: skip
# The last turn alone carries an empty thought, as in Qwen3.
THOUGHT = "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
THINKING = CHATML.replace("{{ m.content }}", THOUGHT + "{{ m.content }}")
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chatml_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> TemplateFormat:
    return TemplateFormat("template", tokenizer)


def with_template(template: str) -> Any:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def plain(messages: Any) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def supervised_text(encoder: TemplateFormat, row: Any) -> list[str]:
    return [encoder.tokenizer.decode(row.input_ids[t.start : t.end + 1]) for t in row.turns if t.supervised]


def test_targets_of_a_turn_are_its_tokens_and_its_terminator(encoder: TemplateFormat, tokenizer: Any) -> None:
    row = encoder.encode(Conversation(TALK))
    assert row.supervised == row.expected
    assert supervised_text(encoder, row) == ["The river.<|im_end|>", "The city.\n<|im_end|>"]
    assert row.input_ids == tokenizer.apply_chat_template(plain(TALK), return_dict=False)
    after = tokenizer.decode(row.input_ids[row.turns[-1].end + 1 :])
    assert after == "\n"


@pytest.mark.parametrize("length", [1, 3])
def test_row_begins_with_the_prompt_that_serving_sends(length: int, encoder: TemplateFormat, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(plain(TALK[:length]), add_generation_prompt=True, return_dict=False)
    turn = encoder.encode(Conversation(TALK)).turns[length // 2]
    assert encoder.encode(Conversation(TALK)).input_ids[: turn.start] == prompt == encoder.prompt(TALK[:length])


@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "<|im_", "end|>", "a", " \n"]), min_size=1))
def test_text_never_becomes_a_control_token(parts: list[str]) -> None:
    encoder = TemplateFormat("template", chatml_tokenizer())
    talk = (Message("user", "a" + "".join(parts)), Message("assistant", "b" + "".join(parts)))
    row = encoder.encode(Conversation(talk))
    markers = set(encoder.control_ids.values())
    # a header and a terminator for each message, and nothing else
    assert sum(token in markers for token in row.input_ids) == 4
    assert encoder.tokenizer.decode(row.input_ids) == encoder.tokenizer.apply_chat_template(plain(talk), tokenize=False)
    assert row.input_ids[row.turns[0].end] == encoder.terminator_id


def test_loss_flags_and_train_on_choose_the_turns(tokenizer: Any) -> None:
    last = make_format("template", tokenizer, train_on="last")
    assert [turn.supervised for turn in last.encode(Conversation(TALK)).turns] == [False, True]
    off = (TALK[0], Message("assistant", "x", loss=False), *TALK[2:])
    assert [turn.supervised for turn in make_format("template", tokenizer).encode(Conversation(off)).turns] == [
        False, True,
    ]  # fmt: skip


def test_parts_of_a_row_are_told_by_its_ids(encoder: TemplateFormat, tokenizer: Any) -> None:
    row = encoder.encode(Conversation(TALK))
    origins = token_origins(row.input_ids, turn_markers(tokenizer))
    for number, turn in enumerate(row.turns):
        inside = origins[turn.start : turn.end + 1]
        assert {(o.role, o.turn) for o in inside} == {("assistant", number)}
        assert [o.part for o in inside] == ["body"] * (turn.end - turn.start) + ["terminator"]
        assert origins[turn.start - 1].part == "header"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (NO_PROMPT, "no generation prompt"),
        (CHATML.replace("<|im_end|>", ""), "no terminator"),
        (CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"), "not prefix-preserving"),
        ("", "no chat template"),
        ("{{ raise_exception('no') }}", "cannot render"),
    ],
    ids=["no-generation-prompt", "no-terminator", "other-prompt", "no-template", "error"],
)  # fmt: skip
def test_template_that_does_not_tell_prompt_and_answer_apart_is_refused(template: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        make_format("template", with_template(template))


def test_template_of_glm4_is_refused_since_it_writes_no_final_stop() -> None:
    with pytest.raises(ModelError, match="no terminator"):
        make_format("template", tiny_tokenizer())


def test_turns_that_are_rendered_otherwise_later_are_refused_and_the_last_one_is_not() -> None:
    """Qwen3's template writes the empty thought of the last turn only, so earlier prompts are no part of the row."""
    tokenizer = with_template(THINKING)
    with pytest.raises(DataError, match="otherwise than the prompt") as caught:
        make_format("template", tokenizer).encode(Conversation(TALK, line=7))
    assert "messages[1]" in caught.value.where
    assert "line 7" in caught.value.where
    row = make_format("template", tokenizer, train_on="last").encode(Conversation(TALK))
    assert [turn.message for turn in row.turns] == [3]
    assert tokenizer.decode(row.input_ids[row.turns[0].start : row.turns[0].end + 1]).startswith("<think>\n\n</think>")


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        (TALK[:1], ({"type": "function", "function": {"name": "f"}},)),
        ((TALK[0], Message("assistant", "{}", "f")), ()),
        ((TALK[0], Message("assistant", "x", reasoning="y")), ()),
        ((TALK[0], Message("observation", "x")), ()),
    ],
    ids=["tools", "call", "reasoning", "observation"],
)
def test_what_a_template_is_not_asked_for_is_refused(messages: Any, tools: Any, encoder: TemplateFormat) -> None:
    with pytest.raises(DataError, match="template has no"):
        encoder.encode(Conversation(messages, tools))


def test_text_that_the_template_changes_is_refused_with_its_message() -> None:
    tokenizer = with_template(CHATML.replace("m.content", "m.content.strip()"))
    with pytest.raises(DataError, match="changes the text") as caught:
        make_format("template", tokenizer).encode(Conversation(TALK))
    assert caught.value.where.endswith("messages[2]")


def test_tokenizer_that_joins_prompt_and_answer_is_refused() -> None:
    """Tokenizers of the first Llamas and Mistrals put a space before every text that they encode."""
    tokenizer = chatml_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("a")
    with pytest.raises(ModelError, match="joins an answer with its prompt"):
        make_format("template", tokenizer)


@pytest.mark.parametrize("option", [{"final_stop": "endoftext"}, {"reasoning": "none"}])
def test_options_of_the_family_are_refused(option: dict[str, str], tokenizer: Any) -> None:
    with pytest.raises(InputError, match="writes what the checkpoint's template writes"):
        make_format("template", tokenizer, **option)
