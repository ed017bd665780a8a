"""Text of other chat templates is told in answers, and whole rendered prompts everywhere; ordinary text never is.

Run: pytest tests/data/test_foreign_text.py
"""

from __future__ import annotations

import pytest

from glm4ft.data.foreign_text import foreign_text
from glm4ft.data.reader import from_messages

MARKERS = {
    "ChatML": "Yes.<|im_end|>",
    "Llama 3": "Yes.<|eot_id|>",
    "Llama 2 or Mistral": "Yes.</s>",
    "Gemma": "Yes.<end_of_turn>",
    "DeepSeek": "Yes.<｜end▁of▁sentence｜>",
    "gpt-oss": "<|channel|>final",
    "Command R": "<|END_OF_TURN_TOKEN|>",
    "Phi": "Yes.<|end|>",
    "InternLM": "Yes.<eoa>",
    "Baichuan": "<reserved_107>Yes.",
    "Alpaca": "### Response: Yes.",
    "Vicuna": "### Assistant: Yes.",
    "GLM-4": "Yes.<|user|>",
    "the tool calls of other formats": "<tool_call>{}</tool_call>",
    "an unknown template": "Yes.<|fin|>",
}


@pytest.mark.parametrize(("family", "text"), MARKERS.items(), ids=MARKERS)
def test_a_marker_in_an_answer_is_told_with_its_family(family: str, text: str) -> None:
    [told] = foreign_text(text, is_answer=True)
    assert f"a marker of {family}:" in told
    assert foreign_text(text, is_answer=False) == [], "a question may well be about a template"


RENDERED = [
    "[gMASK]<sop><|user|>\nHi<|assistant|>\nHello.",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.",
    "<s>[INST] Hi [/INST] Hello.</s>",
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "### Instruction:\nHi\n\n### Response:\nHello.",
    "USER: Hi\nASSISTANT: Hello.",
    "Human: Hi\n\nAssistant: Hello.",
    "问：你好\n\n答：你好。",
]


@pytest.mark.parametrize("text", RENDERED)
@pytest.mark.parametrize("is_answer", [True, False])
def test_a_rendered_prompt_is_told_in_any_message(text: str, is_answer: bool) -> None:
    assert "whole rendered prompt" in foreign_text(text, is_answer=is_answer)[0]


@pytest.mark.parametrize(
    "text",
    ["", "a < b and [1] | c", "<b>bold</b>", "a <s>struck</s> word", "# Heading", "User: hi", "<div|x>", "x[INSTALL]"],
)
def test_ordinary_text_is_not_told(text: str) -> None:
    assert foreign_text(text, is_answer=True) == []


@pytest.mark.parametrize("text", ["<think>\nr\n</think>\n\n4", "<think></think>4", "r</thinking>4"])
def test_thinking_in_an_answer_is_told(text: str) -> None:
    assert "no reasoning" in foreign_text(text, is_answer=True)[0]
    assert foreign_text(text, is_answer=False) == []


@pytest.mark.parametrize("text", ["<image>\nWhat is it?", "<audio>Who speaks?", "See <|image_1|>."])
def test_a_place_of_media_is_told(text: str) -> None:
    assert "media" in foreign_text(text, is_answer=False)[0]


def test_warnings_name_the_message() -> None:
    system, user, answer = ({"role": role, "content": "a"} for role in ("system", "user", "assistant"))
    [middle] = from_messages([user, answer, user, system, answer]).warnings
    assert middle.startswith("messages[3] is a system message in the middle")
    [first] = from_messages([system, answer, user, answer]).warnings
    assert first.startswith("messages[1] is an answer to nothing")
    [marked] = from_messages([user, answer | {"content": "a<|im_end|>"}]).warnings
    assert marked.startswith("messages[1] holds <|im_end|>")
