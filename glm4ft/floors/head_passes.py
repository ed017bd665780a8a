"""Passes over all rows of a large head, chunk by chunk, for many hidden states or targets at once.

Shapes: K hidden states, C rows of a chunk, V of the head, G groups of rows, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from glm4ft.floors.head import Head
from glm4ft.floors.solver import HeadRows

_CANDIDATES = 512  # rows that a pass over the head proposes for each distribution
_SIDE_BY_SIDE = 32  # hidden states in one product with rows of the head


@dataclass(frozen=True)
class Look:
    """What all rows of a head have in common with K hidden states.

    Args:
        total_K: The logsumexp of the logits.
        likeliest_KM: The ids of the likeliest rows.
        nearest_KM: The ids of the rows with the largest cosine to the hidden state.
    """

    total_K: torch.Tensor
    likeliest_KM: torch.Tensor
    nearest_KM: torch.Tensor


@dataclass(frozen=True)
class Groups:
    """All rows of the head in G groups of rows that had about the same logit at the last hidden state.

    Args:
        sum_GD: The sum of the rows of each group, norm weight applied.
        norm_sum_G: The sum of their Euclidean norms.
        count_G: The number of rows of each group.
    """

    sum_GD: torch.Tensor
    norm_sum_G: torch.Tensor
    count_G: torch.Tensor

    def without(self, own: HeadRows, group_M: torch.Tensor) -> HeadRows:
        """Return the mean row of each group that has other rows than the M given ones, whose groups are given."""
        group_M = group_M.long()
        count_G = self.count_G - torch.bincount(group_M, minlength=len(self.count_G))
        left = count_G > 0
        count_G1 = count_G[left, None].double()
        sum_GD = self.sum_GD.index_add(0, group_M, -own.vectors_MD)[left]
        norm_sum_G = self.norm_sum_G.index_add(0, group_M, -own.norms_M)[left]
        return HeadRows(sum_GD / count_G1, count_G1[:, 0].log(), norm_sum_G / count_G1[:, 0])


class _Top:
    """The ids with the largest scores of each hidden state, over chunks of rows.

    Args:
        count: The number of hidden states.
    """

    def __init__(self, count: int) -> None:
        self.best_KM, self.ids_KM = torch.empty(count, 0), torch.empty(count, 0, dtype=torch.long)

    def add(self, scores_KC: torch.Tensor, start: int) -> None:
        """Add the scores of a chunk that begins at an id."""
        ids_KC = torch.arange(start, start + scores_KC.shape[1]).expand_as(scores_KC)
        all_KM, ids_KM = torch.cat([self.best_KM, scores_KC], dim=1), torch.cat([self.ids_KM, ids_KC], dim=1)
        self.best_KM, at_KM = all_KM.topk(min(_CANDIDATES, all_KM.shape[1]), dim=1)
        self.ids_KM = ids_KM.gather(1, at_KM)


def first_look(head: Head, hidden_KD: torch.Tensor) -> Look:
    """Compare all rows of a head with each hidden state.

    Args:
        head: The frozen head and norm.
        hidden_KD: The hidden states.
    """
    scaled_KD = (hidden_KD * head.norm_D).float()
    total_K = torch.full((len(hidden_KD),), -math.inf, dtype=torch.float64)
    likeliest, nearest = _Top(len(hidden_KD)), _Top(len(hidden_KD))
    for start, rows_CD in head.chunks("first look at the head"):
        logits_KC = _logits(scaled_KD, rows_CD)
        total_K = torch.logaddexp(total_K, torch.logsumexp(logits_KC.double(), dim=1))
        likeliest.add(logits_KC, start)
        nearest.add(logits_KC / head.lengths(rows_CD).clamp_min(1e-30), start)
    return Look(total_K, likeliest.ids_KM, nearest.ids_KM)


def logits_of_all(head: Head, hidden_KD: torch.Tensor) -> torch.Tensor:
    """Return the logits of the whole head at the hidden states, K x V in fp32.

    Args:
        head: The frozen head and norm.
        hidden_KD: The hidden states.
    """
    scaled_KD = (hidden_KD * head.norm_D).float()
    return torch.cat([_logits(scaled_KD, rows_CD) for _, rows_CD in head.chunks("whole head")], dim=1)


def likeliest(logits_V: torch.Tensor) -> list[int]:
    """Return the ids of the rows with the largest logits, the largest first."""
    ids: list[int] = logits_V.topk(min(_CANDIDATES, len(logits_V))).indices.tolist()
    return ids


def sum_groups(head: Head, groups_V: dict[int, torch.Tensor]) -> dict[int, Groups]:
    """Sum the rows of each group of each target.

    Args:
        head: The frozen head and norm.
        groups_V: The group of each row, by target.
    """
    # targets that nothing was learnt of yet have the same groups
    distinct = {id(group_V): group_V for group_V in groups_V.values()}
    width, counts = head.width, {at: int(group_V.max()) + 1 for at, group_V in distinct.items()}
    # float64: the bound holds only if the means are exact
    sums = {at: torch.zeros(n, width + 1, dtype=torch.float64) for at, n in counts.items()}
    buffer = torch.empty(head.chunk_rows, width + 1, dtype=torch.float64)
    for start, rows_CD in head.chunks("groups of rows"):
        summands = buffer[: len(rows_CD)]
        summands[:, :-1], summands[:, -1] = rows_CD, head.lengths(rows_CD)
        for at, group_V in distinct.items():
            sums[at].index_add_(0, group_V[start : start + len(rows_CD)].int(), summands)
    found = {
        at: Groups(sum_GD[:, :-1] * head.norm_D, sum_GD[:, -1], torch.bincount(distinct[at], minlength=counts[at]))
        for at, sum_GD in sums.items()
    }
    return {k: found[id(group_V)] for k, group_V in groups_V.items()}


def _logits(hidden_KD: torch.Tensor, rows_CD: torch.Tensor) -> torch.Tensor:
    """Return the logits of C rows, K x C, computed 32 hidden states at a time.

    Products of other shapes round otherwise, and rounding decides which rows join a subset: a target's bound would
    depend on how many targets are asked for with it.
    """
    missing = -len(hidden_KD) % _SIDE_BY_SIDE
    padded = torch.cat([hidden_KD, hidden_KD.new_zeros(missing, hidden_KD.shape[1])])
    return torch.cat([block @ rows_CD.T for block in padded.split(_SIDE_BY_SIDE)])[: len(hidden_KD)]
