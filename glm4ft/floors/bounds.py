"""Certified bounds under a head of any size: solve on the rows that matter, prove it for all of them.

``logsumexp`` over some of the rows is never more than over all of them, so what is certified on a subset holds for the
whole head. A pass over the whole head finds the rows that matter and the loss really reached; rows left out are not
forgotten but stand behind the subset as mean rows of groups of like logit (see ``floor_solver.HeadRows``).

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

SMALL_HEAD = 8192  # rows; up to here the whole head is solved at once
_BATCH = 64  # distributions solved side by side
_SCANNED = 256  # distributions in one pass over the head
_CANDIDATES = 512  # rows that a pass over the head proposes for each distribution
_NUM_GROUPS = 64  # of like logit among the rows left out
_MAX_SUBSET = 8192  # rows: 256 MiB in float64 at D = 4,096, and as much again while solving
_MAX_ROUNDS = 6
_WORTH_A_ROUND = 0.5  # a round that leaves more than this share of the gap is the last: two passes over the head each
_RELATIVE_TOLERANCE = 0.02  # of a bound under a large head: 4.87 instead of 4.91 tells a user the same
_LARGE_HEAD_STEPS = 300  # the subset grows meanwhile, and whatever is left open, the bound holds


@dataclass(frozen=True)
class Target:
    """A distribution over tokens.

    Args:
        ids: tokens, ascending.
        weights: their probabilities, summing to 1.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def entropy(self) -> float:
        """In nats: what no model gets below."""
        # max: a certain token has entropy -0.0
        return max(0.0, -sum(w * math.log(w) for w in self.weights))


@dataclass(frozen=True)
class Bound:
    """What the head can do with a distribution.

    Args:
        lower: certified lower bound of the cross entropy, nats.
        upper: a cross entropy that the head reaches; in a head of more than ``SMALL_HEAD`` rows it is computed in fp32.
        token_losses: of each token of the distribution where ``upper`` is reached.
    """

    lower: float
    upper: float
    token_losses: tuple[float, ...]


def bound_targets(head: Head, targets: Sequence[Target], *, precision: Precision = EXACT) -> list[Bound]:
    """Bound the cross entropy of each distribution.

    Args:
        head: frozen head and norm.
        targets: distributions over its rows.
        precision: of the forward pass that the bounds are for.
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
    """What a pass over the whole head shows at K hidden states.

    Args:
        total_K: logsumexp of the logits.
        likeliest_KM: ids of the likeliest rows.
        mean_V: logit of each row, in the mean over the states.
    """

    total_K: torch.Tensor
    likeliest_KM: torch.Tensor
    mean_V: torch.Tensor


@dataclass(frozen=True)
class _Groups:
    """The rows of the head in groups.

    Args:
        group_V: which group each row is in.
        counts_G: rows in each, float64.
        sums_GD: their sum, float64.
        norm_sums_G: sum of their norms.
    """

    group_V: torch.Tensor
    counts_G: torch.Tensor
    sums_GD: torch.Tensor
    norm_sums_G: torch.Tensor


class _Search:
    """Bounds under a head that is too large to solve at once."""

    def __init__(self, head: Head, precision: Precision) -> None:
        self.head, self.precision = head, precision

    @functools.cached_property
    def _all_rows(self) -> _Groups:
        """One group, from a pass that is made only where some target needs it."""
        return self._group(torch.zeros(self.head.num_rows))

    def bounds(self, targets: Sequence[Target]) -> list[Bound]:
        """Clear what the head reaches easily, then solve the rest on a growing subset of rows."""
        # the state along the wanted rows: it reaches almost every token, at the price of one pass
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
        """Solve on the subset, look at the whole head, add the rows that turned out to matter, and again."""
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
        """The subset, and behind it one row for what is left of each group."""
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
        """Put rows of like logit together: the mean row then loses little."""
        low, high = logit_V.min(), logit_V.max()
        share_V = (logit_V - low) / (high - low).clamp_min(1e-30)
        group_V = (share_V * _NUM_GROUPS).long().clamp_max(_NUM_GROUPS - 1)
        sums_GD = torch.zeros(_NUM_GROUPS, self.head.width, dtype=torch.float64)
        norm_sums_G = torch.zeros(_NUM_GROUPS, dtype=torch.float64)
        for start, rows_CD in self.head.chunks("groups of rows"):
            own_C = group_V[start : start + len(rows_CD)]
            # float64: the mean must be exact, or the bound would not be one; products of bf16 are exact in fp32
            sums_GD.index_add_(0, own_C, rows_CD.double())
            norm_sums_G.index_add_(0, own_C, rows_CD.norm(dim=1).double())
        counts_G = torch.bincount(group_V, minlength=_NUM_GROUPS).double()
        return _Groups(group_V, counts_G, sums_GD, norm_sums_G)

    def _scan(self, hidden_KD: torch.Tensor, task: str) -> _Scan:
        """One pass over the head."""
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
    """New rows from each ranking in turn, the likeliest first, as many as there is room for."""
    new = dict.fromkeys(token for rank in zip(*ranked, strict=True) for token in rank if token not in known)
    return list(new)[: max(room, 0)]


def _widest_gap(bounds: Sequence[Bound]) -> float:
    return max(bound.upper - bound.lower for bound in bounds)


def _is_tight(bound: Bound) -> bool:
    return bound.upper - bound.lower <= max(TOLERANCE, _RELATIVE_TOLERANCE * bound.lower)


def _better(old: Bound, new: Bound) -> Bound:
    """The higher certified bound with the smaller loss reached."""
    best = new if new.upper <= old.upper else old
    return Bound(max(old.lower, new.lower), best.upper, best.token_losses)
