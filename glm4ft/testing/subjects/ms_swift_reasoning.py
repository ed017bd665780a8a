"""ms-swift's rows of GLM-4.5: model type ``glm4_moe``, template ``glm4_5``, reasoning in tags as it documents it."""

from __future__ import annotations

from typing import Any

from glm4ft.testing.subjects import ms_swift
from glm4ft.testing.subjects.building_blocks import with_tags
from glm4ft.testing.subjects.known_failures import reasons
from glm4ft.testing.subjects.known_failures_reasoning import MS_SWIFT_REASONING

THOUGHT = "<think>{reasoning}</think>\n"


class Configured(ms_swift.Subject):
    """The whole pipeline, as ``swift sft`` with ``template: glm4_5`` configures it."""

    model_type, template_name = "glm4_moe", "glm4_5"

    @property
    def types(self) -> dict[str, Any]:
        """The options that say which model it is and how it is asked: to think, which changes prompts alone."""
        return {**super().types, "enable_thinking": True}


class Subject:
    """The rows of ``swift sft`` with ``template: glm4_5``.

    Args:
        base_dir: The Hugging Face model folder of a base for GLM-4.5.
    """

    name, chat_format, expected_failures = "ms-swift, GLM-4.5", "glm-4.5", reasons(MS_SWIFT_REASONING)

    def __init__(self, base_dir: str) -> None:
        self.pipeline = Configured(base_dir)
        self.tokenizer, self.stop_ids = self.pipeline.tokenizer, self.pipeline.stop_ids

    def encode(self, messages: Any, tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation with ms-swift's template in training mode."""
        return self.pipeline.encode(with_tags({"messages": messages}, THOUGHT)["messages"], tools)

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        """The ids that ms-swift's inference engine makes of a history."""
        return self.pipeline.prompt(with_tags({"messages": messages}, THOUGHT)["messages"], tools)
