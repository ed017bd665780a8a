"""One encoded conversation: its ids, its supervision mask, and where each part of it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IGNORED = -100  # the label of a token that is not supervised; the default ignore_index of torch's cross entropy

Part = Literal["prefix", "header", "body", "terminator"]


@dataclass(frozen=True)
class Segment:
    """A run of tokens with one origin.

    Args:
        role: The role of the tokens' message; ``""`` for the prefix and an appended terminator.
        part: The kind of segment; a header that ends a trained assistant turn is supervised as its terminator.
        message: The index of the message; None for the prefix, the tool block and an appended terminator.
        start: The first position in the row.
        end: One past the last position.
        supervised: True if these tokens contribute to the loss.
    """

    role: str
    part: Part
    message: int | None
    start: int
    end: int
    supervised: bool


@dataclass(frozen=True)
class AssistantTurn:
    """The position of one assistant turn in its row.

    Args:
        message: The index into ``Conversation.messages``.
        start: The first position that the model samples; ``input_ids[:start]`` is what serving sends.
        end: The position of the terminator, the last token the model has to sample.
        supervised: True if the turn is trained.
    """

    message: int
    start: int
    end: int
    supervised: bool


@dataclass(frozen=True)
class EncodedRow:
    """One encoded conversation; all sequences have the same length.

    Args:
        input_ids: The token ids, prefix included.
        supervised: True at each token that the loss counts as a target (unshifted).
        segments: The segments of the row, in order and without gaps.
        turns: The assistant turns, in order.
        line: The line of the conversation in its file, from 1; 0 if it is not from a file.
    """

    input_ids: list[int]
    supervised: list[bool]
    segments: tuple[Segment, ...]
    turns: tuple[AssistantTurn, ...]
    line: int = 0

    @property
    def expected(self) -> list[bool]:
        """The mask that follows from the turns: True from each trained turn's start to its terminator, included."""
        expected = [False] * len(self.input_ids)
        for turn in self.turns:
            if turn.supervised:
                expected[turn.start : turn.end + 1] = [True] * (turn.end + 1 - turn.start)
        return expected

    @property
    def labels(self) -> list[int]:
        """The labels: ids where supervised and -100 elsewhere. They are unshifted, because the model shifts them."""
        return [i if keep else IGNORED for i, keep in zip(self.input_ids, self.supervised, strict=True)]
