"""PrimeIntellect's renderers on GLM-4.5: the rows and the loss mask that its training samples have by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from renderers import GLM45RendererConfig, create_renderer
from renderers.base import build_training_sample
from transformers import AutoTokenizer

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.specification.turn_text import openai_messages
from glm4ft.testing.subjects.known_failures import reasons
from glm4ft.testing.subjects.known_failures_reasoning import RENDERERS_REASONING


class Subject:
    """The rows that ``build_training_sample`` makes.

    Args:
        base_dir: The Hugging Face model folder of a base for GLM-4.5.
    """

    name, chat_format = "renderers, GLM-4.5", "glm-4.5"
    expected_failures = reasons(RENDERERS_REASONING)

    def __init__(self, base_dir: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        self.renderer = create_renderer(self.tokenizer, GLM45RendererConfig())
        self.stop_ids = list(self.renderer.get_stop_token_ids())

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation as ``input_ids`` and ``labels``."""
        flags = {
            "message_loss_mask": [True if message.get("loss") is None else message["loss"] for message in messages]
        }
        row = build_training_sample(
            self.renderer, openai_messages(messages), tools=tools, ensure_final_stop=True, **flags
        )
        ids = list(row.token_ids)
        return {"input_ids": ids, "labels": [i if on else IGNORED for i, on in zip(ids, row.loss_mask, strict=True)]}

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The ids that it sends to a server."""
        return list(self.renderer.render_ids(openai_messages(messages), tools=tools, add_generation_prompt=True))
