"""The label rules of the official GLM-4 script, restated for both of its modes, with plain ``transformers.Trainer``.

Source: ``finetune/finetune.py`` of THUDM/GLM-4 at commit 9c0e421; ``combine: false`` is its default. LoRA adapters and
hyperparameters are the harness's, so only the rows are judged. The script for vision models had the founding bug: see
``founding_bug.py``.
"""

from __future__ import annotations

from typing import Any

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.subjects import transformers_trainer
from glm4ft.testing.subjects.known_failures import OFFICIAL_SCRIPT, OFFICIAL_SCRIPT_COMBINED, reasons


class Subject(transformers_trainer.Subject):
    """The mode ``combine: false``: messages are rendered one by one, and those of the assistant are trained.

    Args:
        base_dir: The Hugging Face model folder of the base.
    """

    name = "official script"
    expected_failures = reasons(OFFICIAL_SCRIPT)

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.tokenizer.padding_side = "left"

    def encode(self, messages: Any, tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation; ``<|user|>`` is appended, and the mask is shifted right by one token."""
        if any(message.get("loss") is False for message in messages):
            raise NotImplementedError("the script has no flag for the loss of one message")
        ids, trained = self._render(messages, tools)
        ids, trained = [*ids, self.tokenizer.convert_tokens_to_ids("<|user|>")], [False, *trained]
        return {"input_ids": ids, "labels": [i if on else IGNORED for i, on in zip(ids, trained, strict=True)]}

    def _render(self, messages: Any, tools: Any) -> tuple[list[int], list[bool]]:
        ids, trained = list(self.tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])), [False, False]
        for index, message in enumerate(messages):
            new = self._ids([message], None if index else tools)[2:]
            ids, trained = ids + new, trained + [message["role"] == "assistant"] * len(new)
        return ids, trained

    def _ids(self, messages: Any, tools: Any) -> list[int]:
        return list(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False))


class Combined(Subject):
    """The mode ``combine: true``: a conversation is rendered at once, and all after the last header is trained.

    The first token after the header is not: the mask is shifted by one token.
    """

    name = "official script, combine"
    expected_failures = reasons(OFFICIAL_SCRIPT_COMBINED)

    def _render(self, messages: Any, tools: Any) -> tuple[list[int], list[bool]]:
        ids = self._ids(messages, tools)
        last = len(ids) - 1 - ids[::-1].index(self.tokenizer.convert_tokens_to_ids("<|assistant|>"))
        return ids, [i > last for i in range(len(ids))]
