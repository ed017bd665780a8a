"""Faults of rows of models that reason: targets that serving supplies, and reasoning where serving has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from glm4ft.data.conversation import Conversation
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.data.render import Renderer
from glm4ft.testing.faults.registry import faults_at
from glm4ft.testing.subjects.reasoning_loop import Subject, Subject47

ESCAPES = "A mask that is wrong only for a layout of reasoning and calls that the bank does not have is not seen."

fault = faults_at("rows")
MASK = r"is supervised|is ignored, should be supervised"


class Masked:
    """Helpers of faults that change the mask of a row."""

    @staticmethod
    def changed(row: EncodedRow, positions: Iterable[int], value: bool) -> list[bool]:
        """The mask with some positions set."""
        chosen = set(positions)
        return [value if at in chosen else keep for at, keep in enumerate(row.supervised)]

    @staticmethod
    def given(row: EncodedRow) -> Iterator[range]:
        """The positions after each assistant's header that serving supplies."""
        for segment in row.segments:
            if segment.role == "assistant" and segment.part == "body" and segment.message is not None:
                turn = next(turn for turn in row.turns if turn.message == segment.message)
                if segment.end <= turn.start:
                    yield range(segment.start, segment.end)


@fault(
    "next-role-token-not-trained",
    evidence="slime 514, 1490; TRL 5988; PrimeIntellect renderers 66: 50 to 283 calls in one turn",
    cause=rf"terminator|{MASK}",
)
class NextRoleTokenNotTrained(Masked, Subject):
    """The role token that ends a turn belongs to the next message, so that only the last turn learns to stop."""

    def supervised(self, row: EncodedRow) -> list[bool]:
        return self.changed(row, (turn.end for turn in row.turns[:-1]), False)


@fault("end-of-reasoning-not-trained", evidence="slime 1490: </think> of GLM-4.7 has no loss", cause=MASK)
class EndOfReasoningNotTrained(Masked, Subject47):
    """``</think>`` is taken for a marker of the template, so the model never learns to end its reasoning."""

    def supervised(self, row: EncodedRow) -> list[bool]:
        closed = self.control_ids["</think>"]
        return self.changed(row, (at for at, token in enumerate(row.input_ids) if token == closed), False)


@fault("empty-reasoning-trained", evidence="NeMo AutoModel 3738; TRL glm4moe_training.jinja", cause=MASK)
class EmptyReasoningTrained(Masked, Subject):
    """The empty block of turns without reasoning is a target, which teaches the model not to think."""

    def supervised(self, row: EncodedRow) -> list[bool]:
        return self.changed(row, (at for span in self.given(row) for at in span), True)


@fault("generation-prompt-trained", evidence="NeMo AutoModel 3739; fw-ai cookbook 403", cause=MASK)
class GenerationPromptTrained(Masked, Subject47):
    """The ``<think>`` with which every prompt ends is a target."""

    def supervised(self, row: EncodedRow) -> list[bool]:
        return self.changed(row, (at for span in self.given(row) for at in span), True)


@fault("role-marker-trained", evidence="GLM-4 issue 342; slime 514", cause=MASK)
class RoleMarkerTrained(Masked, Subject):
    """The assistant's header is a target."""

    def supervised(self, row: EncodedRow) -> list[bool]:
        header = self.control_ids["<|assistant|>"]
        return self.changed(row, (at for at, token in enumerate(row.input_ids) if token == header), True)


@fault("reasoning-not-trained", evidence="NeMo AutoModel mask_reasoning_content, 3738", cause=MASK)
class ReasoningNotTrained(Masked, Subject):
    """Reasoning is rendered, but left out of the loss."""

    def supervised(self, row: EncodedRow) -> list[bool]:
        opened, closed = self.control_ids["<think>"], self.control_ids["</think>"]
        is_inside, positions = False, []
        for at, token in enumerate(row.input_ids):
            is_inside = (is_inside or token == opened) and token != closed
            positions += [at] * is_inside
        return self.changed(row, positions, False)


@fault(
    "scaffold-newline-not-trained", evidence="PrimeIntellect renderers, GLM-4.5: the newline is scaffold", cause=MASK
)
class ScaffoldNewlineNotTrained(Masked, Subject):
    """The newline that the model samples before it thinks is taken for a part of the header."""

    def supervised(self, row: EncodedRow) -> list[bool]:
        return self.changed(row, (turn.start for turn in row.turns), False)


@fault("later-calls-not-trained", evidence="LLaMA-Factory's glm4 function formatter: one call only", cause=MASK)
class LaterCallsNotTrained(Masked, Subject):
    """Of several calls in one turn only the first is trained, so the model never learns to end the turn after them."""

    def supervised(self, row: EncodedRow) -> list[bool]:
        call, positions = self.control_ids["<tool_call>"], list[int]()
        for turn in row.turns:
            starts = [at for at in range(turn.start, turn.end) if row.input_ids[at] == call]
            positions += range(starts[1], turn.end) if len(starts) > 1 else ()
        return self.changed(row, positions, False)


@fault(
    "tool-result-trained", evidence="fw-ai cookbook 400; slime 1490: where the result begins was disputed", cause=MASK
)
class ToolResultTrained(Masked, Subject):
    """The mask goes on from a call over the tool's result."""

    def supervised(self, row: EncodedRow) -> list[bool]:
        results = [s for s in row.segments if s.role == "observation" and s.part == "body"]
        return self.changed(row, (at for s in results for at in range(s.start, s.end)), True)


@fault(
    "answer-after-reasoning-not-trained",
    evidence="Megatron-Bridge 5633: the historical answer lost its loss",
    cause=MASK,
)
class AnswerAfterReasoningNotTrained(Masked, Subject):
    """Turns whose reasoning serving empties are left out of the mask, answer and stop token too."""

    def supervised(self, row: EncodedRow) -> list[bool]:
        return self.changed(row, (at for turn in row.turns[:-1] for at in range(turn.start, turn.end + 1)), False)


@fault(
    "earlier-reasoning-kept",
    evidence="LLaMA-Factory 10770; Megatron-Bridge 5541: truncate_history_thinking",
    cause=r"runs|decode to|template of the checkpoint has",
)
class EarlierReasoningKept(Subject):
    """Every turn keeps its reasoning, while serving empties that of turns before the last question."""

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.format._renderer = Renderer(self.format.name, "kept")


@fault(
    "reasoning-tags-as-text",
    evidence="LLaMA-Factory 9219; TRL 6363",
    cause=r"template of the checkpoint has|decode to|ignored, should be|supervised, should be",
)
class ReasoningTagsAsText(Subject):
    """Reasoning in tags is encoded as ordinary text behind the empty block of a turn without reasoning."""

    def row(self, conversation: Conversation) -> EncodedRow:
        messages = [
            replace(m, reasoning="", content=f"< think>{m.reasoning}< /think>\n{m.content}") if m.reasoning else m
            for m in conversation.messages
        ]
        return super().row(replace(conversation, messages=tuple(messages)))


@fault(
    "silence-not-asked-for",
    evidence="LLaMA-Factory 10770; QwenLM/Qwen3 soft switches: /nothink was missing in training",
    cause=r"template of the checkpoint has",
)
class SilenceNotAskedFor(Subject):
    """Rows without reasoning lack the switch that serving writes behind the user's text."""

    def row(self, conversation: Conversation) -> EncodedRow:
        row, switch = super().row(conversation), self.control_ids["/nothink"]
        kept = [at for at, token in enumerate(row.input_ids) if token != switch]
        ids, supervised = [row.input_ids[at] for at in kept], [row.supervised[at] for at in kept]
        return EncodedRow(ids, supervised, (), row.turns)
