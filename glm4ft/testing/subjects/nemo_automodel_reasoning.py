"""NeMo AutoModel's chat data set on GLM-4.5, with the option that leaves out what serving's prompt supplies."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset
from transformers import AutoTokenizer

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.specification.turn_text import openai_messages
from glm4ft.testing.subjects.known_failures import reasons
from glm4ft.testing.subjects.known_failures_reasoning import NEMO_AUTOMODEL_REASONING


class Subject:
    """The rows of ``ChatDataset``.

    Args:
        base_dir: The Hugging Face model folder of a base for GLM-4.5.
    """

    name, chat_format = "NeMo AutoModel, GLM-4.5", "glm-4.5"
    expected_failures = reasons(NEMO_AUTOMODEL_REASONING)

    def __init__(self, base_dir: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        self.file = Path(tempfile.mkdtemp()) / "chats.jsonl"

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation as ``input_ids`` and ``labels``."""
        if any(message.get("loss") is not None for message in messages):
            raise NotImplementedError("its data has no flag for the loss of one message")
        row = {"messages": openai_messages(messages), **({"tools": tools} if tools else {})}
        if any("tool_calls" in message for message in row["messages"]):
            raise NotImplementedError("it makes a string of a call's arguments, which the template cannot render")
        self.file.write_text(json.dumps(row) + "\n", "utf-8")
        data = ChatDataset(str(self.file), self.tokenizer, unshifted=True, mask_generation_prompt=True)
        try:
            ids, mask = (list(data[0][name]) for name in ("input_ids", "loss_mask"))
        except ValueError as error:  # a turn that another follows is rendered otherwise than alone
            raise NotImplementedError(f"the conversation is refused: {error}") from error
        return {"input_ids": ids, "labels": [i if on else IGNORED for i, on in zip(ids, mask, strict=True)]}

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The ids that a server sends to the model, rendered by the checkpoint's chat template."""
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": True, "return_dict": False}
        return list(self.tokenizer.apply_chat_template(openai_messages(messages), **options))
