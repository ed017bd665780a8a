"""Faults of tokenisation, loss mask and truncation: the ids or the targets of a row are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.faults.registry import MADE_UP, ServedRight, faults_at
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.subjects.plain_loop_data import Batch, Features, TextSegment

ESCAPES = (
    "A mask is not seen to be wrong if it is wrong only for a layout of messages that neither the conversations of the "
    "bank nor generated ones contain."
)
DEFAULT_LENGTH = 512

fault = faults_at("rows")


@fault("control-token-from-content", evidence="transformers 29279, 47822", cause=r"comes from content")
class ControlTokenFromContent(Subject):
    """Marker text in a message is encoded as a control token."""

    def tokenise(self, segment: TextSegment) -> list[int]:
        return list(self.tokenizer.encode(segment.text, add_special_tokens=False))


@fault(
    "prompt-length-from-separate-tokenisation",
    evidence="FastChat 2498, 3006; alpaca-lora fac5372; TRL 1185",
    cause=r"is supervised, should be ignored|decode to",
)
class PromptLengthFromSeparateTokenisation(Subject):
    """An answer is measured by tokenising it without the newline that it merges with, so its mask starts too early."""

    def label(self, segments: Sequence[TextSegment]) -> Features:
        row = super().label(segments)
        end = 0
        for segment in segments:
            end += len(self.tokenise(segment))
            if segment.supervised and not segment.is_control and segment.text.startswith("\n"):
                alone = [self.tokenise(replace(segment, text=text)) for text in ("\n", segment.text[1:])]
                start = end - sum(map(len, alone))
                row["labels"][start:end] = row["input_ids"][start:end]
        return row


@fault(
    "wrong-stop-id", evidence="LLaMA-Factory 77bf3d6, 7911; torchtune 1806; ChatGLM-6B 502", cause=r"<eop>|terminator"
)
class WrongStopId(Subject):
    """The last answer ends with an end-of-document token, at which generation does not stop."""

    def final_stop(self, message: Message) -> str:
        return "<eop>"  # all of <|user|>, <|observation|> and <|endoftext|> would stop a GLM-4


@fault("default-max-length", evidence="axolotl 1818; LLaMA-Factory 6632", cause=r"\bcut\b|length|tokens")
class DefaultMaxLength(Subject):
    """The configured maximum length does not reach the encoder, whose default cuts off the end of long rows."""

    def fit(self, row: Features) -> Features:
        return {name: values[:DEFAULT_LENGTH] for name, values in row.items()}


@fault(
    "prompt-tokens-trained", evidence="alpaca-lora 4a712d4; PraisonAI 4358", cause=r"is supervised, should be ignored"
)
class PromptTokensTrained(Subject):
    """Labels are a copy of the ids."""

    def label(self, segments: Sequence[TextSegment]) -> Features:
        ids = super().label(segments)["input_ids"]
        return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}


@fault("assistant-header-trained", evidence="GLM-4 issue 342; TRL 4201", cause=r"<\|assistant\|>.*should be ignored")
class AssistantHeaderTrained(Subject):
    """The assistant's header is a target, though inference provides it."""

    def render(self, conversation: Conversation) -> list[TextSegment]:
        segments = super().render(conversation)
        return [replace(s, supervised=s.supervised or s.text == "<|assistant|>") for s in segments]


@fault(
    "stop-token-masked-as-pad",
    evidence="TRL 3200, 6357, 988; unsloth 416; llm-course 33",
    cause=r"stop|terminator|pad",
)
class StopTokenMaskedAsPad(Subject):
    """The pad token is the stop token, and the collator removes every pad id from the labels."""

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.tokenizer.pad_token = "<|user|>"

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        return {**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] == self.pad_id, IGNORED)}


@fault("stop-token-not-appended", evidence="TRL 3091; alpaca-lora 6b69ea8", cause=r"no terminator")
class StopTokenNotAppended(ServedRight):
    """The last answer has no stop token."""

    def render(self, conversation: Conversation) -> list[TextSegment]:
        segments = super().render(conversation)
        return segments[:-1] if conversation.messages[-1].role == "assistant" else segments


@fault(
    "last-terminator-missing-behind-calls",
    evidence=MADE_UP,
    cause=r"no terminator|stop token|never ends|is not trained|ends after",
)
class LastTerminatorMissingBehindCalls(Subject):
    """A conversation that ends with a tool call has no stop token after it."""

    def render(self, conversation: Conversation) -> list[TextSegment]:
        segments = super().render(conversation)
        return segments[:-1] if conversation.messages[-1].is_call else segments


@fault(
    "last-answer-token-masked",
    evidence="FastChat 2498; GLM-4 finetune.py, loss_masks = [False, *loss_masks]",
    cause=r"terminator",
)
class LastAnswerTokenMasked(Subject):
    """The mask is shifted by one: the header is trained and the stop token is not."""

    def label(self, segments: Sequence[TextSegment]) -> Features:
        row = super().label(segments)
        supervised = [label != IGNORED for label in row["labels"]]
        shifted = zip(row["input_ids"], [*supervised[1:], False], strict=True)
        return {**row, "labels": [token if keep else IGNORED for token, keep in shifted]}


@fault(
    "only-last-turn-trained", evidence="GLM-4 finetune.py combine; ms-swift last_round", cause=r"is ignored, should be"
)
class OnlyLastTurnTrained(Subject):
    """Only tokens after the last assistant header are targets."""

    def label(self, segments: Sequence[TextSegment]) -> Features:
        row = super().label(segments)
        header = self.control_ids["<|assistant|>"]
        last = max((i for i, token in enumerate(row["input_ids"]) if token == header), default=0)
        return {**row, "labels": [IGNORED] * (last + 1) + row["labels"][last + 1 :]}


@fault("later-user-turns-trained", evidence="unsloth-zoo 899; TRL 1185", cause=r"is supervised, should be ignored")
class LaterUserTurnsTrained(Subject):
    """The user's header is recognised only the first time, so later questions are trained as answers."""

    def render(self, conversation: Conversation) -> list[TextSegment]:
        is_answer, segments = False, []
        for segment in super().render(conversation):
            is_answer = is_answer or segment.supervised
            segments.append(replace(segment, supervised=is_answer))
        return segments


@fault("truncate-after-padding", evidence="TRL 3398", cause=r"\bcut\b")
class TruncateAfterPadding(Subject):
    """Rows padded on the right are cut to their last tokens, so short rows lose text and keep padding."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        kept = batch["input_ids"].shape[1] * 3 // 4
        return {name: tensor[:, -kept:] for name, tensor in batch.items()}


@fault("truncate-some-fields", evidence="axolotl 3401, 2123", cause=r"input_ids but \d+ labels")
class TruncateSomeFields(Subject):
    """Ids are cut to the maximum length, labels are not, and padding hides the difference."""

    def fit(self, row: Features) -> Features:
        return {**row, "input_ids": row["input_ids"][:DEFAULT_LENGTH]}

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        missing = batch["labels"].shape[1] - batch["input_ids"].shape[1]
        fill = {"input_ids": self.pad_id, "attention_mask": 0}
        pad = torch.nn.functional.pad
        return {**batch, **{name: pad(batch[name], (0, missing), value=value) for name, value in fill.items()}}
