"""LLaMA-Factory's rows of GLM-4.5: template ``glm4_moe``, reasoning in tags as its documentation writes it."""

from __future__ import annotations

from typing import Any

from glm4ft.testing.subjects import llamafactory
from glm4ft.testing.subjects.building_blocks import with_tags
from glm4ft.testing.subjects.known_failures import reasons
from glm4ft.testing.subjects.known_failures_reasoning import LLAMA_FACTORY_REASONING

THOUGHT = "<think>\n{reasoning}\n</think>\n\n"


class Configured(llamafactory.Subject):
    """The whole pipeline, as ``llamafactory-cli train`` with ``template: glm4_moe`` configures it."""

    template_name = "glm4_moe"


class Subject:
    """The rows of ``llamafactory-cli train`` with ``template: glm4_moe``.

    Args:
        base_dir: The Hugging Face model folder of a base for GLM-4.5.
    """

    name, chat_format, expected_failures = "LLaMA-Factory, GLM-4.5", "glm-4.5", reasons(LLAMA_FACTORY_REASONING)

    def __init__(self, base_dir: str) -> None:
        self.pipeline = Configured(base_dir)
        self.tokenizer, self.stop_ids = self.pipeline.tokenizer, self.pipeline.stop_ids

    def encode(self, messages: Any, tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation as ``input_ids`` and ``labels``."""
        if any(message.get("tool_calls") for message in messages):
            raise NotImplementedError("the ShareGPT format has no place for a text and several calls in one turn")
        return self.pipeline.encode(with_tags({"messages": messages}, THOUGHT)["messages"], tools)

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        """The ids that LLaMA-Factory's Hugging Face engine makes of a history."""
        return self.pipeline.prompt(with_tags({"messages": messages}, THOUGHT)["messages"], tools)
