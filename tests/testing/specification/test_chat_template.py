"""The rules of trained tokens that hold for every chat template, on templates of three families.

Run: pytest tests/testing/specification/test_chat_template.py
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from glm4ft.data.encoded_row import IGNORED
from glm4ft.model.tiny import tiny_tokenizer
from glm4ft.testing.specification.chat_template import Marks, expected_row, find_mistakes, marks_of
from glm4ft.testing.specification.mask_oracle import Undecidable

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}").replace(
    "{{ m.content }}", "{{ '<think>\n' if m.role == 'assistant' }}{{ m.content }}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
GLM = ""  # the template of the tiny base
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello you"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]


def tokenizer_of(template: str) -> Any:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    if template:
        controls = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": controls})
        tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module", params=[GLM, CHATML, LLAMA, THINKING], ids=["glm", "chatml", "llama", "thinking"])
def known(request: pytest.FixtureRequest) -> tuple[Any, Marks]:
    tokenizer = tokenizer_of(request.param)
    return tokenizer, marks_of(tokenizer)


def mistakes(known: tuple[Any, Marks], ids: Any, labels: Any) -> set[tuple[str, bool]]:
    return {(m.kind, m.is_trained) for m in find_mistakes(known[0], ids, labels, known[1])}


def row_of(known: tuple[Any, Marks]) -> tuple[list[int], list[int]]:
    """The conversation as it should be trained; in GLM's format an end is appended to it."""
    ids, labels = map(list, expected_row(known[0], TALK, None, known[1]))
    if known[1].header == tuple(known[0].encode("<|assistant|>", add_special_tokens=False)):
        ids, labels = ([*part, known[0].convert_tokens_to_ids("<|user|>")] for part in (ids, labels))
    return ids, labels


def test_answers_are_trained_up_to_their_terminator(known: tuple[Any, Marks]) -> None:
    ids, labels = row_of(known)
    trained = [id for id in labels if id != IGNORED]
    text = known[0].decode(trained)
    assert "hello you" in text
    assert "see you" in text
    assert not {"hi", "bye", "assistant"} & set(text.replace("<", " ").split())
    assert sum(id in known[1].terminators for id in trained) == 2
    assert mistakes(known, ids, labels) == set()


def test_each_kind_of_mistake_is_named(known: tuple[Any, Marks]) -> None:
    tokenizer, marks = known
    ids, labels = row_of(known)
    first = next(i for i, label in enumerate(labels) if label != IGNORED)
    end = next(i for i in range(first, len(ids)) if ids[i] in marks.terminators)
    word = next(i for i in range(first + 1, end) if tokenizer.decode([ids[i]]).strip())
    wanted = {
        ("prompt", True): [*ids[:1], *ids[1:first], *labels[first:]],
        ("terminator", False): [*labels[:end], IGNORED, *labels[end + 1 :]],
        ("answer", False): [*labels[:word], IGNORED, *labels[word + 1 :]],
    }
    header = first - len(marks.opening) - 1
    wanted["header", True] = [*labels[:header], ids[header], *labels[header + 1 :]]
    for mistake, wrong in wanted.items():
        assert mistake in mistakes(known, ids, wrong), mistake
    last = max(i for i, id in enumerate(ids) if id in marks.terminators)
    assert ("terminator", False) in mistakes(known, ids[:last], labels[:last])
    if marks.prefix:
        assert ("prefix", False) in mistakes(known, [*marks.prefix, *ids], [IGNORED] * len(marks.prefix) + labels)


def test_answer_that_is_not_trained_at_all_is_no_mistake(known: tuple[Any, Marks]) -> None:
    """The data may say so; the judge counts such answers."""
    ids, labels = row_of(known)
    begin = next(i for i, label in enumerate(labels) if label != IGNORED)
    end = next(i for i in range(begin, len(ids)) if labels[i] == IGNORED)
    assert mistakes(known, ids, [*[IGNORED] * end, *labels[end:]]) == set()


def test_template_without_tokens_of_its_own_is_not_judged() -> None:
    with pytest.raises(Undecidable):
        marks_of(tokenizer_of(PLAIN))
