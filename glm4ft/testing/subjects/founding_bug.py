"""The founding bug as a subject: right in everything but the labels. It has to fail, or the suite is worth nothing."""

from __future__ import annotations

from dataclasses import replace

from glm4ft.data.chat_format import ChatFormat, EncodedRow
from glm4ft.data.conversation import Conversation
from glm4ft.testing.subjects import own


class FoundingBugFormat(ChatFormat):
    """Supervises each assistant turn from its header to the token before its terminator.

    The header is given at inference, so training it is useless; the frozen head cannot express it, so the loss has a
    floor; and the terminator is never learnt, so the model does not stop. Every suite has to notice.
    Source: the label rule of ``finetune_demo/finetune_vision.py`` at commit b5683f2 of THUDM/GLM-4.
    """

    def encode(self, conversation: Conversation) -> EncodedRow:
        """Encode with the wrong labels; the ids are right."""
        row = super().encode(conversation)
        supervised = [False] * len(row.input_ids)
        for turn in row.turns:
            if turn.supervised:
                supervised[turn.start - 1 : turn.end] = [True] * (turn.end - turn.start + 1)
        return replace(row, supervised=supervised)


class Subject(own.Subject):
    """glm4ft with the label rule of zai-org/GLM-4 issue 342: header in, terminator out."""

    name = "founding-bug"

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.format = FoundingBugFormat(self.chat_format, self.tokenizer)
