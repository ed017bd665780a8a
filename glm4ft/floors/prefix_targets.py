"""What follows each prefix: the supervised tokens of a data set, grouped by everything the model sees before them.

Two positions with the same ids before them have the same hidden state, whatever the model, so what their targets share
is one distribution. In a pack rows do not see each other, so a row's own ids are all that counts; ids that truncation
removed are not there any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm4ft.data.chat_format import IGNORED
from glm4ft.data.encoded_rows import TrainedRow
from glm4ft.floors.bounds import Target

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PrefixTargets:
    """All supervised tokens, N of them in reading order, P distinct pairs of prefix and token, U distributions.

    Args:
        row_N: index of the row each stands in.
        position_N: in the row.
        token_N: the token.
        pair_N: index of its pair.
        pair_token_P: token of each pair.
        pair_count_P: how often each pair occurs.
        pair_distribution_P: which distribution the pair's prefix has.
        pair_member_P: where the token stands in ``Target.ids`` of that distribution.
        distributions: the distinct ones.
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
        rows: as trained. A label on the first token of a row counts for nothing: no model predicts it.
    Returns:
        The groups.
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
    """A number for the ids before each position: equal numbers, equal ids.

    In lexical order rows that share a prefix are neighbours, so a row has the numbers of the one before it as far as
    the two agree, and new ones from there on.
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
    """How many ids two rows have in common from the start."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _distributions(prefix_P: Array, token_P: Array, count_P: Array) -> tuple[Array, Array, tuple[Target, ...]]:
    """The distribution of each pair's prefix, each distinct one once."""
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
