"""The chat format of a checkpoint is the one that its own template writes, or it is refused.

Run: pytest tests/data/test_format_check.py  [--glm4ft-tokenizer FOLDER: the real template agrees with its format too]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from glm4ft.data.format_check import detect_format, format_warnings, require_agreement
from glm4ft.data.turn_format import FORMATS
from glm4ft.errors import ModelError
from glm4ft.model.tiny_tokenizer import CHAT_TEMPLATES, tiny_tokenizer

DENSE = CHAT_TEMPLATES["glm-4-0414"]


def with_template(text: str | None, chat_format: Any = "glm-4-0414") -> Any:
    """A tokenizer with another template."""
    tokenizer = tiny_tokenizer(chat_format=chat_format)
    tokenizer.chat_template = text
    return tokenizer


# --- detection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_template_decides_between_the_formats_of_its_architecture(name: Any) -> None:
    for architecture in FORMATS[name].architectures:
        assert detect_format([architecture], tiny_tokenizer(chat_format=name)) == name


@pytest.mark.parametrize("name", FORMATS)
def test_a_template_agrees_with_its_own_format_alone(name: Any) -> None:
    """The two dense formats differ in late system messages only, which is a warning."""
    tokenizer = tiny_tokenizer(chat_format=name)
    assert format_warnings(name, tokenizer, where="x") == []
    for other in set(FORMATS) - {name}:
        assert len(format_warnings(other, tokenizer, where="x")) == 1
        if {name, other} != {"glm-4-0414", "glm-4-9b-chat"}:
            with pytest.raises(ModelError, match=f"contradicts the chat format {other}") as caught:
                require_agreement(other, tokenizer, where="x")
            assert f"--chat_format {name}" in caught.value.fix or "9b-chat" in caught.value.fix


def test_the_real_template_agrees_with_its_format(real_tokenizer: Any) -> None:
    assert detect_format(["GlmForCausalLM"], real_tokenizer) == "glm-4-9b-chat"
    assert format_warnings("glm-4-9b-chat", real_tokenizer, where="x") == []


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("GlmForCausalLM", "glm-4-9b-chat"),
        ("Glm4ForCausalLM", "glm-4-0414"),
        ("Glm4MoeLiteForCausalLM", "glm-4.7"),
    ],
)
def test_without_a_template_the_architecture_decides_if_it_can(architecture: str, expected: str) -> None:
    assert detect_format([architecture], with_template(None)) == expected


def test_without_a_template_a_choice_is_asked_for() -> None:
    with pytest.raises(ModelError, match="several chat formats") as caught:
        detect_format(["Glm4MoeForCausalLM"], with_template(None, "glm-4.5"), where="some/model")
    assert caught.value.expected == "glm-4.5 or glm-4.7"
    assert caught.value.where == "some/model"


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], []])
def test_an_architecture_of_another_family_is_refused(architectures: list[str]) -> None:
    with pytest.raises(ModelError, match="no chat format is known") as caught:
        detect_format(architectures, tiny_tokenizer())
    assert caught.value.found == ("LlamaForCausalLM" if architectures else "no architectures in config.json")
    assert "--chat_format" not in caught.value.fix


# --- disagreement ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    id: str
    text: str
    message: str
    found: str


WRONG = [
    Wrong("space", DENSE.replace("}}\n{{", "}} \n{{"), "", "position 3 the template has ' \\n"),
    Wrong(
        "no-prefix",
        DENSE.replace("[gMASK]<sop>", ""),
        "begins without [gMASK]<sop>, as GLM-Edge's",
        "position 0 the template has '<|system|>",
    ),
    Wrong("no-generation-prompt", DENSE.partition("{% if add_gen")[0], "", "has nothing, the format '<|assistant|>'"),
    Wrong(
        "think",
        DENSE + "{% if add_generation_prompt %}<think>\n{% endif %}",
        "asks for reasoning with <think>, as GLM-Z1's",
        "the format nothing",
    ),
    Wrong("failing", "{{ raise_exception('no system message') }}", "", "an error: TemplateError: no system message"),
    Wrong("other-family", "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}", "", "'<|im"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_a_disagreement_names_both_and_offers_no_other_format(case: Wrong) -> None:
    """A hint must not lead to rows that serving never sends, so no format is offered unless the template agrees."""
    tokenizer = with_template(case.text)
    name = detect_format(["Glm4ForCausalLM"], tokenizer)
    with pytest.raises(ModelError, match="contradicts the chat format") as caught:
        require_agreement(name, tokenizer, where="some/model")
    assert case.message in caught.value.message
    assert case.found in caught.value.found
    assert "--chat_format" not in caught.value.fix
    assert "--force_format true" in caught.value.fix
    [warning] = format_warnings(name, tokenizer, where="some/model")
    assert warning.startswith("some/model: its chat template contradicts the chat format")


@pytest.mark.parametrize(
    ("name", "before", "after", "of"),
    [
        ("glm-4.5", "'\\n<think></think>' if silent else", "'' if silent else", "a prompt without thinking"),
        ("glm-4.5", "endswith('/nothink') %}/nothink", "endswith('/nothink') %} /nothink", "a prompt without thinking"),
        ("glm-4.7", "loop.index0 > asked.last", "loop.last", "turns with reasoning and calls"),
        ("glm-4.7", "loop.previtem.role != 'tool'", "true", "turns with reasoning and calls"),
    ],
)
def test_every_kind_of_turn_is_compared(name: Any, before: str, after: str, of: str) -> None:
    assert CHAT_TEMPLATES[name].count(before) == 1
    tokenizer = with_template(CHAT_TEMPLATES[name].replace(before, after), name)
    with pytest.raises(ModelError) as caught:
        require_agreement(name, tokenizer, where="x")
    assert caught.value.found.startswith(f"{of}: at position")


def test_a_call_that_a_dense_template_writes_otherwise_is_told() -> None:
    tokenizer = with_template(DENSE.replace("{{ m.metadata or '' }}", "{{ m.metadata or '' }}{{ ' ' if m.metadata }}"))
    require_agreement("glm-4-0414", tokenizer, where="x")
    [warning] = format_warnings("glm-4-0414", tokenizer, where="x")
    assert "a tool call: at position" in warning


def test_a_checkpoint_without_a_template_is_told() -> None:
    require_agreement("glm-4-0414", with_template(None), where="x")
    [warning] = format_warnings("glm-4-0414", with_template(None), where="x")
    assert "no server can render a prompt" in warning
