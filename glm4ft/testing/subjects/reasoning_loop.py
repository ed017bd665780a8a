"""The plain loop with rows of a format with reasoning, encoded by this project: what faults of such rows override."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.data.reader import from_messages
from glm4ft.model.tiny_tokenizer import Architecture
from glm4ft.testing.subjects import plain_loop
from glm4ft.testing.subjects.building_blocks import EncodedHere
from glm4ft.testing.subjects.plain_loop_data import Features


class Subject(EncodedHere, plain_loop.Subject):
    """A training loop on rows of GLM-4.5.

    Args:
        base_dir: The Hugging Face model folder whose tokenizer is used.
    """

    name = "reasoning loop"
    chat_format = "glm-4.5"
    architecture: Architecture = "Glm4MoeForCausalLM"

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.format = ChatFormat(self.chat_format, self.tokenizer)

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Features:
        """Encode one conversation as ``input_ids`` and ``labels``."""
        row = self.row(from_messages(messages, tools))
        return {"input_ids": row.input_ids, "labels": row.labels}

    def row(self, conversation: Conversation) -> EncodedRow:
        """The ids and the mask of a conversation."""
        row = self.format.encode(conversation)
        return EncodedRow(row.input_ids, self.supervised(row), row.segments, row.turns)

    def supervised(self, row: EncodedRow) -> list[bool]:
        """The mask of a row."""
        return row.supervised


class SubjectZ1(Subject):
    """A training loop on rows of GLM-Z1."""

    name = "reasoning loop Z1"
    chat_format = "glm-z1-0414"
    architecture: Architecture = "Glm4ForCausalLM"


class Subject47(Subject):
    """A training loop on rows of GLM-4.7-Flash."""

    name = "reasoning loop 4.7"
    chat_format = "glm-4.7"
    architecture: Architecture = "Glm4MoeLiteForCausalLM"
