"""ms-swift's rows of GLM-4.5: model type ``glm4_moe``, template ``glm4_5``, reasoning in tags as it documents it."""

from __future__ import annotations

from typing import Any

from glm4ft.testing.subjects import ms_swift
from glm4ft.testing.subjects.building_blocks import with_tags
from glm4ft.testing.subjects.known_failures import reasons
from glm4ft.testing.subjects.known_failures_reasoning import MS_SWIFT_REASONING

THOUGHT = "<think>{reasoning}</think>\n"


class Subject(ms_swift.Subject):
    """The rows of ``swift sft`` with ``template: glm4_5``; nothing is trained.

    Args:
        base_dir: The Hugging Face model folder of a base for GLM-4.5.
    """

    name, chat_format = "ms-swift, GLM-4.5", "glm-4.5"
    expected_failures = reasons(MS_SWIFT_REASONING)
    model_type, template_name = "glm4_moe", "glm4_5"
    build_model = train = save = load = merge = None

    def encode(self, messages: Any, tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation with ms-swift's template in training mode."""
        return super().encode(with_tags({"messages": messages}, THOUGHT)["messages"], tools)

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        """The ids that ms-swift's inference engine makes of a history, asked to think."""
        return super().prompt(with_tags({"messages": messages}, THOUGHT)["messages"], tools)
