"""The founding bug as a subject: a pipeline with right ids and wrong labels, which the suite must reject."""

from __future__ import annotations

from dataclasses import replace

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.testing.subjects import own


class FoundingBugFormat(ChatFormat):
    """Supervises each assistant turn from its header to the token before its terminator, which is wrong on both ends.

    Inference provides the header, so training it is useless, and the terminator is never learnt, so the model does not
    stop. Whether the loss shows it depends on the base: the frozen head of the built-in one cannot express the header
    (certified by ``glm4ft floor``), and the loss has a floor; that of SmolLM2 can (``docs/real-weights.md``).
    Source: the label rule of ``finetune_demo/finetune_vision.py`` at commit b5683f2 of THUDM/GLM-4.
    """

    def encode(self, conversation: Conversation) -> EncodedRow:
        """Encode a conversation with right ids and wrong labels."""
        row = super().encode(conversation)
        supervised = [False] * len(row.input_ids)
        for turn in row.turns:
            if turn.supervised:
                supervised[turn.start - 1 : turn.end] = [True] * (turn.end - turn.start + 1)
        return replace(row, supervised=supervised)


class Subject(own.Subject):
    """glm4ft with the label rule of zai-org/GLM-4 issue 342: the header is supervised, the terminator is not."""

    name = "founding-bug"

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.format = FoundingBugFormat(self.format_name, self.tokenizer)
