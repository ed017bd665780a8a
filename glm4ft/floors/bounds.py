"""Certified bounds of the cross entropy under a head of any size, from a solution on a subset of its rows.

``logsumexp`` over some of the rows is never more than over all of them, so a bound certified on a subset holds for the
whole head. Each distribution has a subset of its own, so its bound does not depend on which others are asked for. The
subset begins with the rows that are likely where the target's own row points to and with those nearest to it by angle:
the twins of a token that was never trained. A pass over the whole head finds the loss actually reached and the rows
that matter there, which join the subset; the rows outside are represented by their mean (see
``glm4ft.floors.solver.HeadRows``).

Shapes: K target distributions, M rows of the subset, V of the head, D hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from glm4ft.floors.head import Head
from glm4ft.floors.solver import EXACT, TOLERANCE, HeadRows, Precision, Solution, solve

SMALL_HEAD = 8192  # rows; the largest head that is solved whole
_BATCH = 64  # distributions solved side by side
_SCANNED = 256  # distributions in one pass over the head
_CANDIDATES = 512  # rows that a pass over the head proposes for each distribution
_MAX_SUBSET = 8192  # rows: 256 MiB in float64 at D = 4,096, and as much again while solving
_MAX_ROUNDS = 16
_PROGRESS, _PATIENCE = 0.9, 3  # a target is given up after this many rounds that leave more than this share of its gap
UNDECIDED = 0.02  # nats between the bounds of a distribution above which the lower one says nothing if it is as small
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

    @property
    def is_decided(self) -> bool:
        """Whether the bounds say if the head can reach the distribution: it certainly cannot, or they are near."""
        return self.lower > UNDECIDED or self.upper - self.lower <= UNDECIDED


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
        nearest_KM: The ids of the rows with the largest cosine to the hidden state.
    """

    total_K: torch.Tensor
    likeliest_KM: torch.Tensor
    nearest_KM: torch.Tensor


class _Search:
    """Bounds targets under a head that is too large to solve whole."""

    def __init__(self, head: Head, precision: Precision) -> None:
        self.head, self.precision = head, precision

    @functools.cached_property
    def _sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of all rows and of their norms, by a pass over the head that is made only if some target needs it."""
        sum_D, norm_sum = torch.zeros(self.head.width, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for _, rows_CD in self.head.chunks("mean row"):
            # float64: the bound holds only if the mean is exact; products of bf16 are exact in fp32
            sum_D += rows_CD.double().sum(dim=0)
            norm_sum += rows_CD.norm(dim=1).double().sum()
        return sum_D, norm_sum

    def bounds(self, targets: Sequence[Target]) -> list[Bound]:
        """Bound the targets that the head reaches easily, then solve each of the others on its own growing subset."""
        # the state in the direction of the target rows reaches almost every token, at the cost of one pass
        hidden_KD = torch.stack([self._mean_row(target) for target in targets])
        hidden_KD = self.head.radius * hidden_KD / hidden_KD.norm(dim=1, keepdim=True).clamp_min(1e-300)
        scan = self._scan(hidden_KD, "first look at the head")
        bounds = [
            self._bound(target, target.entropy, hidden_KD[k], float(scan.total_K[k]))
            for k, target in enumerate(targets)
        ]
        # the twins of a token that was never trained are near its row, and not always likely where it is likely
        subsets = {
            k: {*target.ids, *scan.likeliest_KM[k].tolist(), *scan.nearest_KM[k].tolist()}
            for k, target in enumerate(targets) if not _is_tight(bounds[k])
        }  # fmt: skip
        patience = dict.fromkeys(subsets, _PATIENCE)
        for _ in range(_MAX_ROUNDS):
            if not subsets:
                break
            solved = {k: self._solve(targets[k], sorted(subset)) for k, subset in subsets.items()}
            scan = self._scan(torch.cat([solution.hidden_BD for solution in solved.values()]), "whole head")
            for i, (k, solution) in enumerate(solved.items()):
                found = self._bound(
                    targets[k], float(solution.lower_B[0]), solution.hidden_BD[0], float(scan.total_K[i])
                )
                before, bounds[k] = bounds[k], _better(bounds[k], found)
                patience[k] = _PATIENCE if _gap(bounds[k]) <= _PROGRESS * _gap(before) else patience[k] - 1
                new = [id for id in scan.likeliest_KM[i].tolist() if id not in subsets[k]]
                subsets[k] |= set(new[: max(0, _MAX_SUBSET - len(subsets[k]))])
                if _is_tight(bounds[k]) or not new or not patience[k]:
                    del subsets[k]
        return bounds

    def _solve(self, target: Target, ids: list[int]) -> Solution:
        """Solve a target on a subset of the rows, with the mean row of all others beside it."""
        rows = self._rows(ids)
        target_KM = _dense([target], {token: m for m, token in enumerate(ids)}, len(rows.log_counts_M))
        return solve(
            rows, target_KM, self.head.radius, precision=self.precision, tolerance=TOLERANCE / 2,
            max_steps=_LARGE_HEAD_STEPS,
        )  # fmt: skip

    def _bound(self, target: Target, lower: float, hidden_D: torch.Tensor, total: float) -> Bound:
        logits = (self.head.rows(list(target.ids)) @ hidden_D).tolist()
        token_losses = tuple(max(0.0, total - logit) for logit in logits)
        upper = sum(w * loss for w, loss in zip(target.weights, token_losses, strict=True))
        return Bound(lower, max(upper, lower), token_losses)

    def _mean_row(self, target: Target) -> torch.Tensor:
        return torch.tensor(target.weights, dtype=torch.float64) @ self.head.rows(list(target.ids))

    def _rows(self, ids: list[int]) -> HeadRows:
        """Return the rows of the subset, followed by the mean of all others."""
        own = HeadRows.of(self.head.rows(ids))
        count = self.head.num_rows - len(ids)
        if not count:
            return own
        sum_D, norm_sum = self._sums
        mean_1D = (sum_D - own.vectors_MD.sum(dim=0))[None] / count
        return HeadRows(
            torch.cat([own.vectors_MD, mean_1D]),
            torch.cat([own.log_counts_M, torch.tensor([math.log(count)], dtype=torch.float64)]),
            torch.cat([own.norms_M, (norm_sum - own.norms_M.sum())[None] / count]),
        )

    def _scan(self, hidden_KD: torch.Tensor, task: str) -> _Scan:
        """Make one pass over the whole head at the given hidden states."""
        hidden_KD = hidden_KD.float()
        total_K = torch.full((len(hidden_KD),), -math.inf, dtype=torch.float64)
        likeliest, nearest = _Top(len(hidden_KD)), _Top(len(hidden_KD))
        for start, rows_CD in self.head.chunks(task):
            logits_KC = hidden_KD @ rows_CD.T
            total_K = torch.logaddexp(total_K, torch.logsumexp(logits_KC.double(), dim=1))
            likeliest.add(logits_KC, start)
            nearest.add(logits_KC / rows_CD.norm(dim=1).clamp_min(1e-30), start)
        return _Scan(total_K, likeliest.ids_KM, nearest.ids_KM)


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


def _dense(targets: Sequence[Target], place: dict[int, int], width: int) -> torch.Tensor:
    target_KM = torch.zeros(len(targets), width, dtype=torch.float64)
    for k, target in enumerate(targets):
        target_KM[k, [place[token] for token in target.ids]] = torch.tensor(target.weights, dtype=torch.float64)
    return target_KM


def _gap(bound: Bound) -> float:
    return bound.upper - bound.lower


def _is_tight(bound: Bound) -> bool:
    return _gap(bound) <= max(TOLERANCE, _RELATIVE_TOLERANCE * bound.lower)


def _better(old: Bound, new: Bound) -> Bound:
    """Combine two bounds of one target: the higher certified bound and the smaller loss reached."""
    best = new if new.upper <= old.upper else old
    return Bound(max(old.lower, new.lower), best.upper, best.token_losses)
