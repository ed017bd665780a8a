"""The supervised tokens of a data set, grouped by their prefix, all the ids that the model sees before them.

Two positions with equal prefixes have the same hidden state, whatever the model, so their targets form one
distribution. In a pack rows do not see each other, so a prefix consists of the row's own ids; ids removed by truncation
are not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm4ft.data.encoded_row import IGNORED
from glm4ft.data.encoded_rows import TrainedRow
from glm4ft.floors.bounds import Target

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PrefixTargets:
    """The supervised tokens of a data set, grouped by prefix.

    Shapes: N supervised tokens in reading order, P distinct pairs of prefix and token, U distinct distributions.

    Args:
        row_N: The index of each token's row.
        position_N: The position of each token in its row.
        token_N: The id of each token.
        pair_N: The index of each token's pair.
        pair_token_P: The token of each pair.
        pair_count_P: The number of occurrences of each pair.
        pair_distribution_P: The index of the distribution at each pair's prefix.
        pair_member_P: The index of each pair's token in ``Target.ids`` of that distribution.
        distributions: The U distinct distributions.
    """

    row_N: Array
    position_N: Array
    token_N: Array
    pair_N: Array
    pair_token_P: Array
    pair_count_P: Array
    pair_distribution_P: Array
    pair_member_P: Array
    distributions: tuple[Target, ...]


def group_targets(rows: Sequence[TrainedRow]) -> PrefixTargets:
    """Group the supervised tokens of rows by their prefix.

    Args:
        rows: The rows as trained. A label on the first token of a row is ignored: no model predicts it.
    Returns:
        The tokens, pairs and distributions.
    """
    ids = [np.asarray(row.input_ids, dtype=np.int64) for row in rows]
    positions = [np.flatnonzero(np.asarray(row.labels)[1:] != IGNORED) + 1 for row in rows]
    prefixes = _prefix_numbers(ids, positions)
    tokens = [np.asarray(row.labels, dtype=np.int64)[p] for row, p in zip(rows, positions, strict=True)]
    token_N, prefix_N = _joined(tokens), _joined(prefixes)
    width = int(token_N.max(initial=0)) + 1
    key_P, pair_N, count_P = np.unique(prefix_N * width + token_N, return_inverse=True, return_counts=True)
    distribution_P, member_P, distributions = _distributions(key_P // width, key_P % width, count_P)
    row_N = np.repeat(np.arange(len(rows)), [len(p) for p in positions])
    return PrefixTargets(
        row_N=row_N,
        position_N=_joined(positions),
        token_N=token_N,
        pair_N=pair_N,
        pair_token_P=key_P % width,
        pair_count_P=count_P,
        pair_distribution_P=distribution_P,
        pair_member_P=member_P,
        distributions=distributions,
    )


def _prefix_numbers(ids: list[Array], positions: list[Array]) -> list[Array]:
    """Number the prefixes at the given positions, so that equal prefixes have equal numbers.

    In lexical order rows that share a prefix are neighbours, so a row reuses the numbers of the row before it as far as
    the two agree, and gets new ones from there on.
    """
    # big-endian bytes compare like the ids themselves
    order = sorted(range(len(ids)), key=lambda i: ids[i].astype(">u4").tobytes())
    numbers: list[Array] = [np.empty(0, dtype=np.int64)] * len(ids)
    before, before_numbers, used = np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64), 1
    for i in order:
        shared = _agreement(before, ids[i])
        fresh = len(ids[i]) - shared
        # entry t is the number of the first t ids
        own = np.concatenate([before_numbers[: shared + 1], np.arange(used, used + fresh)])
        used += fresh
        numbers[i] = own[positions[i]]
        before, before_numbers = ids[i], own
    return numbers


def _agreement(a: Array, b: Array) -> int:
    """Count the ids that two rows share from the start."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _distributions(prefix_P: Array, token_P: Array, count_P: Array) -> tuple[Array, Array, tuple[Target, ...]]:
    """Return the index of the distribution at each pair's prefix, each token's index in it, and the distributions."""
    starts = np.flatnonzero(np.diff(prefix_P, prepend=-1))
    ends = np.append(starts, len(prefix_P))[1:]
    numbers: dict[Target, int] = {}
    distribution_P = np.empty(len(prefix_P), dtype=np.int64)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        counts = count_P[start:end]
        target = Target(tuple(token_P[start:end].tolist()), tuple((counts / counts.sum()).tolist()))
        distribution_P[start:end] = numbers.setdefault(target, len(numbers))
    member_P = np.arange(len(prefix_P)) - np.repeat(starts, ends - starts)
    return distribution_P, member_P, tuple(numbers)


def _joined(parts: list[Array]) -> Array:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
