"""Certified lower bound of the mean loss that any adapter below a frozen head can reach on a data set.

Two effects bound the loss from below, whatever is trained. Where equal prefixes have different continuations, no model
is right every time: its loss is at least the entropy of the continuations. And behind a frozen final norm the frozen
head expresses some tokens badly: ``glm4ft.floors.solver`` bounds the loss at the best possible hidden state. Both are
known before training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from glm4ft.data.encoded_rows import TrainedRow, token_origins
from glm4ft.errors import DataError
from glm4ft.floors.bounds import Bound, Target, bound_targets
from glm4ft.floors.head import Head
from glm4ft.floors.prefix_targets import Array, PrefixTargets, group_targets
from glm4ft.floors.solver import EXACT, Precision
from glm4ft.text.token_text import TokenDecoder, token_text

# A token whose floor under the head is above this is called hard to reach: its probability stays below 0.9.
HARD_TO_REACH = 0.1
_ROUNDING = 1e-12  # of sums in float64, by which a bound that equals the entropy may exceed it


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
        label: The arithmetic that the bound holds for, in words.
        per_target: The floor of each supervised token, row by row.
    """

    floor: float
    entropy: float
    head: float
    gap: float
    tokens: tuple[TokenFloor, ...]
    samples: tuple[SampleFloor, ...]
    parts: Mapping[str, float]
    label: str
    per_target: Array = field(repr=False, compare=False)

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

    def record(self) -> dict[str, Any]:
        """Return the object that ``glm4ft floor --json`` writes."""
        return {
            "schema": 1,
            "floor": self.floor,
            "entropy": self.entropy,
            "head": self.head,
            "gap": self.gap,
            "label": self.label,
            "parts": dict(self.parts),
            "tokens": [vars(token) for token in self.tokens],
            "samples": [vars(sample) for sample in self.samples],
        }


def find_floor(
    rows: Iterable[TrainedRow],
    tokenizer: PreTrainedTokenizerBase,
    head: Head | None,
    *,
    precision: Precision = EXACT,
) -> Floor:
    """Bound the mean loss of rows from below.

    Args:
        rows: The rows as they are trained, in their chat format and cut to length.
        tokenizer: The tokenizer that encoded the rows.
        head: The frozen head and final norm; None if either is trained, in which case the floor is the entropy alone.
        precision: The precision of the forward pass that the bound is for.
    Returns:
        The floor; its ``floor`` is certified, whatever its ``gap``.
    Raises:
        DataError: If no token is supervised.
    """
    rows = list(rows)
    targets = group_targets(rows)
    if not len(targets.token_N):
        raise DataError("no token is supervised, so there is no loss", fix="look at the mask with glm4ft inspect")
    distinct = [Target((token,), (1.0,)) for token in np.unique(targets.token_N).tolist()]
    bounds = _bounds(list(dict.fromkeys([*distinct, *targets.distributions])), head, precision)
    floor_P, gap_P, entropy_P = _of_pairs(targets, bounds)
    per_target = floor_P[targets.pair_N]
    entropy = float(entropy_P[targets.pair_N].mean())
    above = float(per_target.mean()) - entropy
    part = above if above > _ROUNDING else 0.0
    return Floor(
        floor=entropy + part,
        entropy=entropy,
        head=part,
        gap=float(gap_P[targets.pair_N].mean()),
        tokens=_token_floors(targets, per_target, tokenizer, {t.ids[0]: bounds[t] for t in distinct}),
        samples=_sample_floors(targets, per_target, rows),
        parts=_part_floors(targets, per_target, rows, tokenizer.get_added_vocab()),
        label=_label(head, precision),
        per_target=per_target,
    )


def _bounds(targets: Sequence[Target], head: Head | None, precision: Precision) -> dict[Target, Bound]:
    if head is None:
        losses = [tuple(0 - float(np.log(w)) for w in target.weights) for target in targets]
        found = [Bound(t.entropy, t.entropy, loss) for t, loss in zip(targets, losses, strict=True)]
    else:
        highest = max(target.ids[-1] for target in targets)
        if highest >= head.num_rows:
            raise DataError("a target has no row in the head", found=str(highest), expected=f"below {head.num_rows}")
        found = bound_targets(head, targets, precision=precision)
    return dict(zip(targets, found, strict=True))


def _of_pairs(targets: PrefixTargets, bounds: Mapping[Target, Bound]) -> tuple[Array, Array, Array]:
    """Return the floor, gap and entropy of each pair of prefix and token.

    The bound of a distribution is divided among its tokens in proportion to their losses at the smallest loss found, so
    that the mean over their occurrences is the bound.
    """
    floors: list[list[float]] = []
    for target in targets.distributions:
        bound = bounds[target]
        scale = bound.lower / bound.upper if bound.upper > 0 else 0.0
        floors.append([scale * loss for loss in bound.token_losses])
    distribution_P = targets.pair_distribution_P.tolist()
    floor_P = np.array([floors[u][m] for u, m in zip(distribution_P, targets.pair_member_P.tolist(), strict=True)])
    gap_U = np.array([bounds[t].upper - bounds[t].lower for t in targets.distributions])
    entropy_U = np.array([target.entropy for target in targets.distributions])
    return floor_P, gap_U[distribution_P], entropy_U[distribution_P]


def _token_floors(
    targets: PrefixTargets, per_target: Array, tokenizer: PreTrainedTokenizerBase, of_head: Mapping[int, Bound]
) -> tuple[TokenFloor, ...]:
    decoder = TokenDecoder(tokenizer)
    ids, inverse, counts = np.unique(targets.token_N, return_inverse=True, return_counts=True)
    sums = np.bincount(inverse, weights=per_target)
    floors = [
        token_floor(token, token_text(decoder, token), count, of_head[token], total / count)
        for token, count, total in zip(ids.tolist(), counts.tolist(), sums.tolist(), strict=True)
    ]
    return tuple(sorted(floors, key=lambda token: (-token.floor * token.count, token.id)))


def token_floor(id: int, text: str, count: int, of_head: Bound, floor: float) -> TokenFloor:
    """The floor of a token with what the head alone allows.

    Args:
        id: The id of the token.
        text: The text of the token.
        count: The number of times the token is a target.
        of_head: The bounds of the token's loss under the head.
        floor: The mean floor over the token's occurrences, nats.
    """
    return TokenFloor(id, text, count, floor, of_head.lower, of_head.upper, of_head.is_decided)


def _sample_floors(targets: PrefixTargets, per_target: Array, rows: Sequence[TrainedRow]) -> tuple[SampleFloor, ...]:
    counts = np.bincount(targets.row_N, minlength=len(rows)).tolist()
    sums = np.bincount(targets.row_N, weights=per_target, minlength=len(rows)).tolist()
    floors = [SampleFloor(r.line, s / n, n) for r, s, n in zip(rows, sums, counts, strict=True) if n]
    return tuple(sorted(floors, key=lambda sample: -sample.floor))


def _part_floors(
    targets: PrefixTargets, per_target: Array, rows: Sequence[TrainedRow], control_ids: Mapping[str, int]
) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    row_places: dict[int, Any] = {}
    for row, position, floor in zip(
        targets.row_N.tolist(), targets.position_N.tolist(), per_target.tolist(), strict=True
    ):
        if row not in row_places:
            row_places = {row: token_origins(rows[row].input_ids, control_ids)}
        place = row_places[row][position]
        sums.setdefault(f"{place.role} {place.part}".strip(), []).append(floor)
    return {name: sum(floors) / len(floors) for name, floors in sums.items()}


def _label(head: Head | None, precision: Precision) -> str:
    if head is None:
        return "entropy alone: head or final norm are trained"
    if precision is EXACT:
        return "exact arithmetic; fp32 agrees to its rounding, bf16 may lie about 1 % below"
    return f"forward passes in {precision.name}"
