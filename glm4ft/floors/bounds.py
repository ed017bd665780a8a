"""Certified bounds of the cross entropy under a head of any size, from a solution on a subset of its rows.

``logsumexp`` over some of the rows is never more than over all of them, so a bound certified on a subset holds for the
whole head. Each distribution has a subset of its own, so its bound does not depend on which others are asked for. The
subset begins with the rows that are likely where the target's own row points to and with those nearest to it by angle:
the twins of a token that was never trained. A pass over the whole head finds the loss actually reached and the rows
that matter there, which join the subset. The rows outside are represented by the means of groups (see
``glm4ft.floors.solver.HeadRows``): at first one, then groups of about equal logits at the last state found, which costs
the bound little however many rows there are.

Shapes: K target distributions, M rows of the subset, V of the head, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from glm4ft.floors.head import Head
from glm4ft.floors.head_passes import Groups, first_look, likeliest, logits_of_all, sum_groups
from glm4ft.floors.solver import EXACT, TOLERANCE, HeadRows, Precision, Solution, solve

SMALL_HEAD = 8192  # rows; the largest head that is solved whole
_BATCH = 64  # distributions solved side by side
_SCANNED = 256  # distributions in one pass over the head
_MAX_SUBSET = 8192  # rows: 256 MiB in float64 at D = 4,096, and as much again while solving
_GROUPS, _GROUP_WIDTH = 96, 0.25  # of logits, nats: the rows outside the subset, down to e^-24 of the probability
_GROUPED = 32  # targets whose groups are summed in one pass: 3 MiB each at D = 4,096
_MAX_ROUNDS = 16
_PROGRESS, _PATIENCE = 0.9, 2  # a target is given up after this many rounds that leave more than this share of its gap
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
    def is_certain(self) -> bool:
        """Whether the distribution has one token only."""
        return len(self.ids) == 1

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
        batches = _batches(targets, _BATCH)
        return [bound for batch in batches for bound in _solve_whole(head, rows, batch, precision)]
    search = _Search(head, precision)
    return [bound for batch in _batches(targets, _SCANNED) for bound in search.bounds(batch)]


def _batches(targets: Sequence[Target], size: int) -> Iterator[Sequence[Target]]:
    with tqdm(total=len(targets), desc="bounding", unit=" targets", delay=2, disable=None, leave=False) as shown:
        for start in range(0, len(targets), size):
            batch = targets[start : start + size]
            yield batch
            shown.update(len(batch))


def _solve_whole(head: Head, rows: HeadRows, targets: Sequence[Target], precision: Precision) -> Iterator[Bound]:
    target_KV = _dense(targets, {i: i for i in range(head.num_rows)}, head.num_rows)
    solution = solve(rows, target_KV, head.radius, precision=precision)
    logits_KV = solution.hidden_BD @ rows.vectors_MD.T
    losses_KV = torch.logsumexp(logits_KV, dim=1, keepdim=True) - logits_KV
    for k, target in enumerate(targets):
        token_losses = tuple(losses_KV[k, list(target.ids)].tolist())
        yield Bound(float(solution.lower_B[k]), float(solution.upper_B[k]), token_losses)


class _Search:
    """Bounds targets under a head that is too large to solve whole."""

    def __init__(self, head: Head, precision: Precision) -> None:
        self.head, self.precision = head, precision

    def bounds(self, targets: Sequence[Target]) -> list[Bound]:
        """Bound the targets that the head reaches easily, then solve each of the others on its own growing subset."""
        # the state in the direction of the target rows reaches almost every token, at the cost of one pass
        hidden_KD = torch.stack([self._mean_row(target) for target in targets])
        hidden_KD = self.head.radius * hidden_KD / hidden_KD.norm(dim=1, keepdim=True).clamp_min(1e-300)
        look = first_look(self.head, hidden_KD)
        bounds = [
            self._bound(target, target.entropy, hidden_KD[k], float(look.total_K[k]))
            for k, target in enumerate(targets)
        ]
        # the twins of a token that was never trained are near its row, and not always likely where it is likely
        subsets = {
            k: {*target.ids, *look.likeliest_KM[k].tolist(), *look.nearest_KM[k].tolist()}
            for k, target in enumerate(targets) if not _is_tight(bounds[k])
        }  # fmt: skip
        patience = dict.fromkeys(subsets, _PATIENCE)
        groups_V = dict.fromkeys(subsets, torch.zeros(self.head.num_rows, dtype=torch.uint8))
        for _ in range(_MAX_ROUNDS):
            if not subsets:
                break
            solved = self._solve_all(targets, subsets, groups_V)
            scan = logits_of_all(self.head, torch.cat([solution.hidden_BD for solution in solved.values()]))
            for i, (k, solution) in enumerate(solved.items()):
                total = torch.logsumexp(scan[i].double(), dim=0)
                found = self._bound(targets[k], float(solution.lower_B[0]), solution.hidden_BD[0], float(total))
                before, bounds[k] = bounds[k], _better(bounds[k], found)
                patience[k] = _PATIENCE if _gap(bounds[k]) <= _PROGRESS * _gap(before) else patience[k] - 1
                if _is_tight(bounds[k]) or not patience[k]:
                    del subsets[k]
                    continue
                groups_V[k] = ((total - scan[i]) / _GROUP_WIDTH).clamp(0, _GROUPS - 1).to(torch.uint8)
                new = [id for id in likeliest(scan[i]) if id not in subsets[k]]
                subsets[k] |= set(new[: max(0, _MAX_SUBSET - len(subsets[k]))])
        return bounds

    def _solve_all(
        self, targets: Sequence[Target], subsets: dict[int, set[int]], groups_V: dict[int, torch.Tensor]
    ) -> dict[int, Solution]:
        """Solve each target on its subset, the other rows of its head represented by the means of their groups."""
        solved: dict[int, Solution] = {}
        open_targets = list(subsets)
        for at in range(0, len(open_targets), _GROUPED):
            block = open_targets[at : at + _GROUPED]
            tails = sum_groups(self.head, {k: groups_V[k] for k in block})
            solved |= {k: self._solve(targets[k], sorted(subsets[k]), groups_V[k], tails[k]) for k in block}
        return solved

    def _solve(self, target: Target, ids: list[int], group_V: torch.Tensor, tail: Groups) -> Solution:
        """Solve a target on a subset of the rows, with the mean rows of all others beside it."""
        own = HeadRows.of(self.head.rows(ids))
        rows = _joined(own, tail.without(own, group_V[ids]))
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


def _joined(own: HeadRows, others: HeadRows) -> HeadRows:
    return HeadRows(
        torch.cat([own.vectors_MD, others.vectors_MD]),
        torch.cat([own.log_counts_M, others.log_counts_M]),
        torch.cat([own.norms_M, others.norms_M]),
    )


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
