"""The floor of a data set: of its mean loss, of each token, of each row and of each part of a turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from glm4ft.floors.flat_rows import Array
from glm4ft.text.safe_text import json_text

# A token whose floor under the head is above this is called hard to reach: its probability stays below 0.9.
HARD_TO_REACH = 0.1


@dataclass(frozen=True)
class TokenFloor:
    """The floor of one token of the vocabulary.

    Args:
        id: The id of the token.
        text: The text of the token, safe to print; the name of a control token.
        count: The number of times the token is a target.
        floor: The mean floor over the token's occurrences, nats.
        head: The certified lower bound of the token's loss that is due to the head, at any position, nats; 0 without a
            head.
        head_reaches: A loss of the token that the head reaches at some hidden state, nats; 0 without a head.
        is_decided: Whether the two say if the head can express the token.
    """

    id: int
    text: str
    count: int
    floor: float
    head: float
    head_reaches: float = 0.0
    is_decided: bool = True


@dataclass(frozen=True)
class SampleFloor:
    """The floor of one row.

    Args:
        line: The line of the conversation in its file.
        floor: The mean floor over the row's supervised tokens, nats.
        supervised_tokens: The number of supervised tokens of the row.
    """

    line: int
    floor: float
    supervised_tokens: int


@dataclass(frozen=True, eq=False)
class SampleFloors(Sequence[SampleFloor]):
    """The floors of all rows with a supervised token, made one by one from arrays when they are asked for.

    Args:
        lines: The line of each row's conversation.
        floors: The floor of each row.
        num_targets: The number of supervised tokens of each row.
    """

    lines: Array
    floors: Array
    num_targets: Array

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, at: int) -> SampleFloor: ...
    @overload
    def __getitem__(self, at: slice) -> SampleFloors: ...
    def __getitem__(self, at: int | slice) -> SampleFloor | SampleFloors:
        if isinstance(at, slice):
            return SampleFloors(self.lines[at], self.floors[at], self.num_targets[at])
        return SampleFloor(int(self.lines[at]), float(self.floors[at]), int(self.num_targets[at]))


@dataclass(frozen=True)
class Floor:
    """Lower bound of the mean loss of a data set, in nats per supervised token: ``floor = entropy + head``.

    Args:
        floor: The bound: no adapter below the frozen head reaches a lower mean loss.
        entropy: The part due to equal prefixes with different continuations, which holds for every model.
        head: The part that the frozen head and final norm add.
        gap: The width of the interval, from ``floor`` to ``floor + gap``, that contains the exact infimum under head
            and norm.
        tokens: The floor of every distinct target, the largest share of the total first.
        samples: The floor of every row with a supervised token, the highest first.
        parts: The mean floor of each kind of supervised token (``assistant body``, ``assistant terminator``, ...).
        label: The arithmetic and the head that the bound holds for, in words.
        floor_P: The floor of each pair of a distribution and one of its tokens.
        pair_N: The index of the pair of each supervised token, row by row.
    """

    floor: float
    entropy: float
    head: float
    gap: float
    tokens: tuple[TokenFloor, ...]
    samples: SampleFloors
    parts: Mapping[str, float]
    label: str
    floor_P: Array = field(repr=False, compare=False)
    pair_N: Array = field(repr=False, compare=False)

    @property
    def per_target(self) -> Array:
        """The floor of each supervised token, row by row."""
        floors: Array = self.floor_P[self.pair_N]
        return floors

    @property
    def num_targets(self) -> int:
        """The number of supervised tokens."""
        return len(self.pair_N)

    def blocking(self, target_loss: float) -> list[TokenFloor]:
        """Return the tokens that keep the mean loss above a target, the worst first.

        Args:
            target_loss: The mean loss to reach, nats.
        Returns:
            The fewest tokens without whose floor the mean would reach the target; empty if the floor is not above it.
        """
        if not self.floor > target_loss:
            return []
        excess, total = [], sum(token.count for token in self.tokens)
        left = self.floor * total
        for token in self.tokens:
            if not left > target_loss * total:
                break
            excess.append(token)
            left -= token.floor * token.count
        return excess

    @property
    def undecided(self) -> list[TokenFloor]:
        """The tokens of which it is not known whether the head can reach them, the most frequent first."""
        return sorted((token for token in self.tokens if not token.is_decided), key=lambda token: -token.count)

    def json(self) -> Iterator[str]:
        """Write the object of ``glm4ft floor --json``, in pieces: a million rows are a long list."""
        record = {
            "schema": 1,
            "floor": self.floor,
            "entropy": self.entropy,
            "head": self.head,
            "gap": self.gap,
            "label": self.label,
            "parts": dict(self.parts),
            "tokens": [vars(token) for token in self.tokens],
        }
        yield json_text(record).removesuffix("}") + ', "samples": ['
        for number, sample in enumerate(self.samples):
            yield (", " if number else "") + json_text(vars(sample))
        yield "]}\n"
