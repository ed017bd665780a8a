"""Certified lower bound of the mean loss that any adapter below a frozen head can reach on a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenFloor:
    """One token of the vocabulary as a target.

    Args:
        id: of the token.
        text: of the token; control tokens by name.
        count: how often it is a target.
        floor: mean over its occurrences, nats.
    """

    id: int
    text: str
    count: int
    floor: float


@dataclass(frozen=True)
class SampleFloor:
    """One row.

    Args:
        line: of the conversation in its file.
        floor: mean over its supervised tokens, nats.
        supervised_tokens: of the row.
    """

    line: int
    floor: float
    supervised_tokens: int


@dataclass(frozen=True)
class Floor:
    """Lower bound of the mean loss of a data set, in nats per supervised token: ``floor = entropy + head``.

    Args:
        floor: no adapter below the frozen head reaches a lower mean loss.
        entropy: the part that no model whatsoever gets below: equal prefixes that go on differently.
        head: the part that the frozen head and final norm add.
        gap: the exact infimum under head and norm lies between ``floor`` and ``floor + gap``.
        tokens: every distinct target, that with the largest share of the floor first.
        samples: every row, that with the highest floor first.
        parts: mean floor of the supervised tokens of a kind (``assistant body``, ``assistant terminator``, ...).
        label: what the bound holds for, in words.
    """

    floor: float
    entropy: float
    head: float
    gap: float
    tokens: tuple[TokenFloor, ...]
    samples: tuple[SampleFloor, ...]
    parts: Mapping[str, float]
    label: str
