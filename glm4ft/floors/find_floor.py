"""Certified lower bound of the mean loss that any adapter below a frozen head can reach on a data set.

Two effects bound the loss from below, whatever is trained. Where equal prefixes have different continuations, no model
is right every time: its loss is at least the entropy of the continuations. And behind a frozen final norm the frozen
head expresses some tokens badly: ``glm4ft.floors.solver`` bounds the loss at the best possible hidden state. Both are
known before training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from glm4ft.data.encoded_rows import TrainedRow, turn_markers
from glm4ft.errors import DataError
from glm4ft.floors.bounds import Bound, Target, bound_targets
from glm4ft.floors.flat_rows import Array, FlatRows, chunks, counts
from glm4ft.floors.floor import Floor, SampleFloors, TokenFloor
from glm4ft.floors.head import Head
from glm4ft.floors.prefix_targets import PrefixTargets, group_targets
from glm4ft.floors.solver import EXACT, Precision
from glm4ft.text.token_text import TokenDecoder, token_text

_ROUNDING = 1e-12  # of sums in float64, by which a bound that equals the entropy may exceed it


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
    flat = FlatRows.of(rows, turn_markers(tokenizer))
    if not len(flat.token_N):
        raise DataError("no token is supervised, so there is no loss", fix="look at the mask with glm4ft inspect")
    _require_rows(flat, head)
    targets = group_targets(flat)
    bounds = _bounds(targets.distributions, head, precision)
    floor_P, gap_P, entropy_P = _of_pairs(targets, bounds)
    count_P = counts(targets.pair_N)
    share_P = count_P / len(targets.pair_N)
    entropy = float(share_P @ entropy_P)
    above = float(share_P @ floor_P) - entropy
    part = above if above > _ROUNDING else 0.0
    return Floor(
        floor=entropy + part,
        entropy=entropy,
        head=part,
        gap=float(share_P @ gap_P),
        tokens=_token_floors(targets, floor_P, count_P, bounds, tokenizer),
        samples=_sample_floors(flat, targets.pair_N, floor_P),
        parts=_part_floors(flat, targets.pair_N, floor_P),
        label=_label(head, precision),
        floor_P=floor_P,
        pair_N=targets.pair_N,
    )


def _require_rows(rows: FlatRows, head: Head | None) -> None:
    lowest, highest = int(rows.token_N.min()), int(rows.token_N.max())
    if lowest < 0 or (head is not None and highest >= head.num_rows):
        expected = "a token id" if head is None else f"from 0 to {head.num_rows - 1}"
        raise DataError(
            "a target has no row in the head", found=str(lowest if lowest < 0 else highest), expected=expected
        )


def _bounds(targets: Sequence[Target], head: Head | None, precision: Precision) -> list[Bound]:
    if head is not None:
        return bound_targets(head, targets, precision=precision)
    losses = [tuple(0 - float(np.log(w)) for w in target.weights) for target in targets]
    return [Bound(t.entropy, t.entropy, loss) for t, loss in zip(targets, losses, strict=True)]


def _of_pairs(targets: PrefixTargets, bounds: Sequence[Bound]) -> tuple[Array, Array, Array]:
    """Return the floor, gap and entropy of each pair of a distribution and one of its tokens.

    The bound of a distribution is divided among its tokens in proportion to their losses at the smallest loss found, so
    that the mean over their occurrences is the bound.
    """
    scales = [bound.lower / bound.upper if bound.upper > 0 else 0.0 for bound in bounds]
    floors = [scale * loss for scale, bound in zip(scales, bounds, strict=True) for loss in bound.token_losses]
    gap_U = np.array([bound.upper - bound.lower for bound in bounds])
    entropy_U = np.array([target.entropy for target in targets.distributions])
    return np.array(floors), gap_U[targets.pair_distribution_P], entropy_U[targets.pair_distribution_P]


def _token_floors(
    targets: PrefixTargets,
    floor_P: Array,
    count_P: Array,
    bounds: Sequence[Bound],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[TokenFloor, ...]:
    decoder = TokenDecoder(tokenizer)
    token_P = np.array([token for target in targets.distributions for token in target.ids])
    of_head = {target.ids[0]: b for target, b in zip(targets.distributions, bounds, strict=True) if target.is_certain}
    counts = np.bincount(token_P, weights=count_P)
    sums = np.bincount(token_P, weights=count_P * floor_P)
    floors = [
        token_floor(i, token_text(decoder, i), int(counts[i]), of_head[i], float(sums[i] / counts[i]))
        for i in np.flatnonzero(counts).tolist()
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


def _sample_floors(rows: FlatRows, pair_N: Array, floor_P: Array) -> SampleFloors:
    kept = np.flatnonzero(rows.num_targets_R)
    num_targets = rows.num_targets_R[kept]
    ends = np.cumsum(num_targets)
    sums = [
        # reduceat needs no index of the row of each target; rows without targets would confuse it
        np.add.reduceat(floor_P[pair_N[begin : ends[piece][-1]]], ends[piece] - num_targets[piece] - begin)
        for piece, begin in _pieces(ends)
    ]
    floors = np.concatenate(sums) / num_targets
    order = np.argsort(-floors, kind="stable")
    return SampleFloors(rows.lines_R[kept][order], floors[order], num_targets[order])


def _pieces(ends: Array) -> Iterator[tuple[slice, int]]:
    """Split rows, of which it is given where each one's targets end, in pieces of about as many targets as ``chunks``.

    Yields:
        The rows of a piece, and the index of their first target.
    """
    limits = [piece.stop for piece in chunks(int(ends[-1]))]
    stops = np.unique(np.append(np.searchsorted(ends, limits, side="right"), len(ends)))
    for start, stop in pairwise([0, *stops[stops > 0].tolist()]):
        yield slice(start, stop), int(ends[start - 1]) if start else 0


def _part_floors(rows: FlatRows, pair_N: Array, floor_P: Array) -> dict[str, float]:
    sums = np.zeros(len(rows.parts))
    for piece in chunks(len(pair_N)):
        sums += np.bincount(rows.part_N[piece], weights=floor_P[pair_N[piece]], minlength=len(sums))
    return dict(zip(rows.parts, (sums / counts(rows.part_N)).tolist(), strict=True))


def _label(head: Head | None, precision: Precision) -> str:
    if head is None:
        return "entropy alone: head or final norm are trained"
    tied = "; the head is tied to the embeddings, which must stay frozen too" if head.is_tied else ""
    if precision is EXACT:
        return f"exact arithmetic; fp32 agrees to its rounding, bf16 may lie about 1 % below{tied}"
    return f"forward passes in {precision.name}{tied}"
