"""The supervised tokens of a data set, grouped by their prefix, all the ids that the model sees before them.

Two positions with equal prefixes have the same hidden state, whatever the model, so their targets form one
distribution. In a pack rows do not see each other, so a prefix consists of the row's own ids; ids removed by truncation
are not part of it.

All rows are read side by side, position by position. Rows whose prefixes agree so far form a group; a row that is alone
in its group shares no later prefix either, and is not looked at again.

Shapes: R rows, A rows that share their prefix with another one, N supervised tokens in reading order, P pairs of a
distribution and one of its tokens, U distinct distributions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from glm4ft.floors.bounds import Target
from glm4ft.floors.flat_rows import Array, FlatRows, chunks, counts


@dataclass(frozen=True)
class PrefixTargets:
    """The distribution at each supervised token's prefix.

    Args:
        pair_N: The index of each supervised token's pair, int32.
        pair_distribution_P: The index of each pair's distribution.
        pair_member_P: The index of each pair's token in ``Target.ids`` of that distribution.
        distributions: The U distinct distributions; those of one token only come first, ascending.
    """

    pair_N: Array
    pair_distribution_P: Array
    pair_member_P: Array
    distributions: tuple[Target, ...]


def group_targets(rows: FlatRows) -> PrefixTargets:
    """Group the supervised tokens of rows by their prefix.

    Args:
        rows: The rows as trained.
    Returns:
        The pairs and distributions.
    """
    # most prefixes are followed by one token only; that is the pair of a token until a group of rows disagrees
    distinct = np.flatnonzero(counts(rows.token_N))
    number_of = np.zeros(int(distinct.max(initial=0)) + 1, dtype=np.int32)
    number_of[distinct] = np.arange(len(distinct))
    pair_N = np.empty_like(rows.token_N)
    for piece in chunks(len(pair_N)):
        pair_N[piece] = number_of[rows.token_N[piece]]
    numbers = {Target((token,), (1.0,)): u for u, token in enumerate(distinct.tolist())}
    first_pair = list(range(len(numbers)))
    num_pairs = len(numbers)
    for targets, group, token in _shared(rows):
        for chosen_A, target, member_A in _mixed(group, token):
            if target not in numbers:
                numbers[target] = len(first_pair)
                first_pair.append(num_pairs)
                num_pairs += len(target.ids)
            pair_N[targets[chosen_A]] = first_pair[numbers[target]] + member_A
    sizes = np.diff(np.append(first_pair, num_pairs)).astype(np.int64)
    return PrefixTargets(
        pair_N=pair_N,
        pair_distribution_P=np.repeat(np.arange(len(sizes)), sizes),
        pair_member_P=np.arange(num_pairs) - np.repeat(np.asarray(first_pair, dtype=np.int64), sizes),
        distributions=tuple(numbers),
    )


def _shared(rows: FlatRows) -> Iterator[tuple[Array, Array, Array]]:
    """Go through the positions at which several rows have the same prefix and some of them a target.

    Yields:
        The indices of the targets at the position, the number of the group of each, and its token.
    """
    width = int(rows.ids_T.max(initial=0)) + 1
    next_R = np.cumsum(rows.num_targets_R) - rows.num_targets_R  # the first target of each row that is not passed
    position = 0
    row_A: Array = np.flatnonzero(rows.num_targets_R).astype(np.int32)
    group_A: Array = np.zeros(len(row_A), dtype=np.int32)
    while len(row_A):
        position += 1
        is_longer_A = rows.lengths_R[row_A] > position
        row_A, group_A = row_A[is_longer_A], group_A[is_longer_A]
        key_A = group_A.astype(np.int64) * width + rows.ids_T[rows.starts_R[row_A] + position - 1]
        _, group_A, size = np.unique(key_A, return_inverse=True, return_counts=True)
        has_company_A = size[group_A] > 1
        row_A, group_A = row_A[has_company_A], group_A[has_company_A].astype(np.int32)
        is_target_A = rows.is_target_T[rows.starts_R[row_A] + position].astype(bool)
        if is_target_A.any():
            targets = next_R[row_A[is_target_A]]
            next_R[row_A[is_target_A]] += 1
            yield targets, group_A[is_target_A], rows.token_N[targets]


def _mixed(group_A: Array, token_A: Array) -> Iterator[tuple[Array, Target, Array]]:
    """Find the groups whose targets differ.

    Yields:
        The places of the group's targets, their distribution, and the index of each target's token in it.
    """
    order = np.lexsort((token_A, group_A))
    group_A, token_A = group_A[order], token_A[order]
    starts = np.flatnonzero(np.diff(group_A, prepend=-1))
    ends = np.append(starts, len(group_A))[1:]
    # sorted: a group's tokens differ exactly if its first and its last do
    differs = token_A[starts] != token_A[ends - 1]
    for start, end in zip(starts[differs].tolist(), ends[differs].tolist(), strict=True):
        ids, member, count = np.unique(token_A[start:end], return_inverse=True, return_counts=True)
        target = Target(tuple(ids.tolist()), tuple((count / count.sum()).tolist()))
        yield order[start:end], target, member
