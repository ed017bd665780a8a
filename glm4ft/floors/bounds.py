"""Certified bounds of the cross entropy under a head of any size, from a solution on a subset of its rows.

``logsumexp`` over some of the rows is never more than over all of them, so a bound certified on a subset holds for the
whole head. A pass over the whole head finds the rows that matter and the loss actually reached; the rows outside the
subset are represented by the mean rows of groups of similar logits (see ``glm4ft.floors.solver.HeadRows``).

Shapes: K target distributions, M rows of the subset, V of the head, G groups of rows, D hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from glm4ft.floors.head import Head
from glm4ft.floors.solver import EXACT, TOLERANCE, HeadRows, Precision, solve

SMALL_HEAD = 8192  # rows; the largest head that is solved whole
_BATCH = 64  # distributions solved side by side
_SCANNED = 256  # distributions in one pass over the head
_CANDIDATES = 512  # rows that a pass over the head proposes for each distribution
_NUM_GROUPS = 64  # groups of similar logits among the rows outside the subset
_MAX_SUBSET = 8192  # rows: 256 MiB in float64 at D = 4,096, and as much again while solving
_MAX_ROUNDS = 6
_WORTH_A_ROUND = 0.5  # a round that leaves more than this share of the gap is the last: each costs two head passes
_RELATIVE_TOLERANCE = 0.02  # of a bound under a large head: 4.87 instead of 4.91 makes no difference to a user
_LARGE_HEAD_STEPS = 300  # descent steps per round; the subset grows between rounds, and the bound holds at any step


@dataclass(frozen=True)
class Target:
    """A distribution over tokens.

    Args:
        ids: The tokens, ascending.
        weights: The probabilities of the tokens, summing to 1.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def entropy(self) -> float:
        """The entropy in nats, below which no model's cross entropy can be."""
        # max: a certain token has entropy -0.0
        return max(0.0, -sum(w * math.log(w) for w in self.weights))


@dataclass(frozen=True)
class Bound:
    """Bounds of the least cross entropy that the head can reach on a distribution.

    Args:
        lower: The certified lower bound of the cross entropy, nats.
        upper: A cross entropy that the head reaches, nats; for a head of more than ``SMALL_HEAD`` rows it is computed
            in fp32.
        token_losses: The loss of each token of the distribution where ``upper`` is reached, nats.
    """

    lower: float
    upper: float
    token_losses: tuple[float, ...]


def bound_targets(head: Head, targets: Sequence[Target], *, precision: Precision = EXACT) -> list[Bound]:
    """Bound the cross entropy of each distribution.

    Args:
        head: The frozen head and norm.
        targets: The distributions over the rows of the head.
        precision: The precision of the forward pass that the bounds are for.
    Returns:
        A bound for each distribution.
    """
    if head.num_rows <= SMALL_HEAD:
        rows = HeadRows.of(head.rows(list(range(head.num_rows))))
        batches = (targets[i : i + _BATCH] for i in range(0, len(targets), _BATCH))
        return [bound for batch in batches for bound in _solve_whole(head, rows, batch, precision)]
    search = _Search(head, precision)
    batches = (targets[i : i + _SCANNED] for i in range(0, len(targets), _SCANNED))
    return [bound for batch in batches for bound in search.bounds(batch)]


def _solve_whole(head: Head, rows: HeadRows, targets: Sequence[Target], precision: Precision) -> Iterator[Bound]:
    target_KV = _dense(targets, {i: i for i in range(head.num_rows)}, head.num_rows)
    solution = solve(rows, target_KV, head.radius, precision=precision)
    logits_KV = solution.hidden_BD @ rows.vectors_MD.T
    losses_KV = torch.logsumexp(logits_KV, dim=1, keepdim=True) - logits_KV
    for k, target in enumerate(targets):
        token_losses = tuple(losses_KV[k, list(target.ids)].tolist())
        yield Bound(float(solution.lower_B[k]), float(solution.upper_B[k]), token_losses)


@dataclass(frozen=True)
class _Scan:
    """The result of a pass over the whole head at K hidden states.

    Args:
        total_K: The logsumexp of the logits.
        likeliest_KM: The ids of the likeliest rows.
        mean_V: The mean logit of each row over the hidden states.
    """

    total_K: torch.Tensor
    likeliest_KM: torch.Tensor
    mean_V: torch.Tensor


@dataclass(frozen=True)
class _Groups:
    """A partition of the head's rows into groups.

    Args:
        group_V: The index of each row's group.
        counts_G: The number of rows in each group, float64.
        sums_GD: The sum of the rows in each group, float64.
        norm_sums_G: The sum of the norms of the rows in each group.
    """

    group_V: torch.Tensor
    counts_G: torch.Tensor
    sums_GD: torch.Tensor
    norm_sums_G: torch.Tensor


class _Search:
    """Bounds targets under a head that is too large to solve whole."""

    def __init__(self, head: Head, precision: Precision) -> None:
        self.head, self.precision = head, precision

    @functools.cached_property
    def _all_rows(self) -> _Groups:
        """All rows as one group, computed by a pass over the head only if some target needs it."""
        return self._group(torch.zeros(self.head.num_rows))

    def bounds(self, targets: Sequence[Target]) -> list[Bound]:
        """Bound the targets that the head reaches easily, then solve the others on a growing subset of rows."""
        # the state in the direction of the target rows reaches almost every token, at the cost of one pass
        hidden_KD = torch.stack([self._mean_row(target) for target in targets])
        hidden_KD = self.head.radius * hidden_KD / hidden_KD.norm(dim=1, keepdim=True).clamp_min(1e-300)
        scan = self._scan(hidden_KD, "first look at the head")
        bounds = [
            self._bound(target, target.entropy, hidden_KD[k], float(scan.total_K[k]))
            for k, target in enumerate(targets)
        ]
        pending = [k for k, bound in enumerate(bounds) if not _is_tight(bound)]
        for i in range(0, len(pending), _BATCH):
            part = pending[i : i + _BATCH]
            candidates = set(scan.likeliest_KM[part].flatten().tolist())
            solved = self._solve([targets[k] for k in part], [bounds[k] for k in part], candidates)
            for k, bound in zip(part, solved, strict=True):
                bounds[k] = bound
        return bounds

    def _solve(self, targets: list[Target], bounds: list[Bound], subset: set[int]) -> list[Bound]:
        """Alternate between solving on the subset and adding to it the rows that a pass over the head finds likely."""
        subset = subset | {token for target in targets for token in target.ids}
        groups = self._all_rows
        for _ in range(_MAX_ROUNDS):
            ids = sorted(subset)
            rows = self._rows(ids, groups)
            target_KM = _dense(targets, {token: m for m, token in enumerate(ids)}, len(rows.log_counts_M))
            solution = solve(
                rows,
                target_KM,
                self.head.radius,
                precision=self.precision,
                tolerance=TOLERANCE / 2,
                max_steps=_LARGE_HEAD_STEPS,
            )
            scan = self._scan(solution.hidden_BD, "whole head")
            found = [
                self._bound(target, float(solution.lower_B[k]), solution.hidden_BD[k], float(scan.total_K[k]))
                for k, target in enumerate(targets)
            ]
            before = _widest_gap(bounds)
            bounds = [_better(old, new) for old, new in zip(bounds, found, strict=True)]
            is_open = [k for k, bound in enumerate(bounds) if not _is_tight(bound)]
            if not is_open or not _widest_gap(bounds) < _WORTH_A_ROUND * before:
                break
            subset |= set(_in_turn(scan.likeliest_KM[is_open].tolist(), subset, _MAX_SUBSET - len(subset)))
            groups = self._group(scan.mean_V)
        return bounds

    def _bound(self, target: Target, lower: float, hidden_D: torch.Tensor, total: float) -> Bound:
        logits = (self.head.rows(list(target.ids)) @ hidden_D).tolist()
        token_losses = tuple(max(0.0, total - logit) for logit in logits)
        upper = sum(w * loss for w, loss in zip(target.weights, token_losses, strict=True))
        return Bound(lower, max(upper, lower), token_losses)

    def _mean_row(self, target: Target) -> torch.Tensor:
        return torch.tensor(target.weights, dtype=torch.float64) @ self.head.rows(list(target.ids))

    def _rows(self, ids: list[int], groups: _Groups) -> HeadRows:
        """Return the rows of the subset, followed by one mean row for the remaining rows of each group."""
        own = HeadRows.of(self.head.rows(ids))
        group_M = groups.group_V[ids]
        counts_G = groups.counts_G - torch.bincount(group_M, minlength=_NUM_GROUPS)
        sums_GD = groups.sums_GD.index_add(0, group_M, -own.vectors_MD)
        norm_sums_G = groups.norm_sums_G.index_add(0, group_M, -own.norms_M)
        left = counts_G > 0
        return HeadRows(
            torch.cat([own.vectors_MD, sums_GD[left] / counts_G[left, None]]),
            torch.cat([own.log_counts_M, counts_G[left].log()]),
            torch.cat([own.norms_M, norm_sums_G[left] / counts_G[left]]),
        )

    def _group(self, logit_V: torch.Tensor) -> _Groups:
        """Group rows by similar logits, so that a mean row represents its group closely."""
        low, high = logit_V.min(), logit_V.max()
        share_V = (logit_V - low) / (high - low).clamp_min(1e-30)
        group_V = (share_V * _NUM_GROUPS).long().clamp_max(_NUM_GROUPS - 1)
        sums_GD = torch.zeros(_NUM_GROUPS, self.head.width, dtype=torch.float64)
        norm_sums_G = torch.zeros(_NUM_GROUPS, dtype=torch.float64)
        for start, rows_CD in self.head.chunks("groups of rows"):
            own_C = group_V[start : start + len(rows_CD)]
            # float64: the bound holds only if the mean is exact; products of bf16 are exact in fp32
            sums_GD.index_add_(0, own_C, rows_CD.double())
            norm_sums_G.index_add_(0, own_C, rows_CD.norm(dim=1).double())
        counts_G = torch.bincount(group_V, minlength=_NUM_GROUPS).double()
        return _Groups(group_V, counts_G, sums_GD, norm_sums_G)

    def _scan(self, hidden_KD: torch.Tensor, task: str) -> _Scan:
        """Make one pass over the whole head at the given hidden states."""
        hidden_KD = hidden_KD.float()
        total_K = torch.full((len(hidden_KD),), -math.inf, dtype=torch.float64)
        mean_V = torch.empty(self.head.num_rows)
        best_KM, ids_KM = torch.empty(len(hidden_KD), 0), torch.empty(len(hidden_KD), 0, dtype=torch.long)
        for start, rows_CD in self.head.chunks(task):
            logits_KC = hidden_KD @ rows_CD.T
            total_K = torch.logaddexp(total_K, torch.logsumexp(logits_KC.double(), dim=1))
            mean_V[start : start + len(rows_CD)] = logits_KC.mean(dim=0)
            ids_C = torch.arange(start, start + len(rows_CD)).expand_as(logits_KC)
            all_KM, all_ids_KM = torch.cat([best_KM, logits_KC], dim=1), torch.cat([ids_KM, ids_C], dim=1)
            best_KM, at_KM = all_KM.topk(min(_CANDIDATES, all_KM.shape[1]), dim=1)
            ids_KM = all_ids_KM.gather(1, at_KM)
        return _Scan(total_K, ids_KM, mean_V)


def _dense(targets: Sequence[Target], place: dict[int, int], width: int) -> torch.Tensor:
    target_KM = torch.zeros(len(targets), width, dtype=torch.float64)
    for k, target in enumerate(targets):
        target_KM[k, [place[token] for token in target.ids]] = torch.tensor(target.weights, dtype=torch.float64)
    return target_KM


def _in_turn(ranked: list[list[int]], known: set[int], room: int) -> list[int]:
    """Pick new rows from each ranking in turn, the likeliest first, at most ``room`` of them."""
    new = dict.fromkeys(token for rank in zip(*ranked, strict=True) for token in rank if token not in known)
    return list(new)[: max(room, 0)]


def _widest_gap(bounds: Sequence[Bound]) -> float:
    return max(bound.upper - bound.lower for bound in bounds)


def _is_tight(bound: Bound) -> bool:
    return bound.upper - bound.lower <= max(TOLERANCE, _RELATIVE_TOLERANCE * bound.lower)


def _better(old: Bound, new: Bound) -> Bound:
    """Combine two bounds of one target: the higher certified bound and the smaller loss reached."""
    best = new if new.upper <= old.upper else old
    return Bound(max(old.lower, new.lower), best.upper, best.token_losses)
