"""The bound under a frozen head holds and is tight, on random heads, in exact arithmetic and in bf16.

Run: pytest tests/floors/test_solver.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from glm4ft.floors.solver import BF16, TOLERANCE, HeadRows, solve


@dataclass(frozen=True)
class Shape:
    """The shape of some random heads; the 500 heads of all shapes reach from no token (rows near 0) to every token."""

    rows: int
    hidden: int
    std: float


SHAPES = [Shape(20, 4, 0.1), Shape(20, 4, 1.0), Shape(40, 8, 0.3), Shape(60, 8, 1.0), Shape(60, 16, 0.5)]
HEADS = 100  # of each shape; every second one has a mixed target


def random_heads(shape: Shape, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads_HVD = shape.std * torch.randn(HEADS, shape.rows, shape.hidden, generator=generator, dtype=torch.float64)
    targets_HV = F.one_hot(torch.randint(0, shape.rows, (HEADS,), generator=generator), shape.rows).double()
    mixed_HV = torch.rand(HEADS, shape.rows, generator=generator, dtype=torch.float64).pow(6)
    targets_HV[1::2] = (mixed_HV / mixed_HV.sum(dim=1, keepdim=True))[1::2]
    return heads_HVD, targets_HV


def losses(heads_HVD: torch.Tensor, targets_HV: torch.Tensor, hidden_HD: torch.Tensor) -> torch.Tensor:
    logits_HV = torch.einsum("hvd,hd->hv", heads_HVD, hidden_HD)
    return torch.logsumexp(logits_HV, dim=1) - (targets_HV * logits_HV).sum(dim=1)


def optimise_directly(heads_HVD: torch.Tensor, targets_HV: torch.Tensor, radius: float) -> torch.Tensor:
    """Find the smallest losses by accelerated projected gradients of fixed length, from a start of their own."""
    length_H1 = 1 / torch.linalg.matrix_norm(heads_HVD, ord=2).square()[:, None]
    hidden_HD = torch.zeros(len(heads_HVD), heads_HVD.shape[2], dtype=torch.float64)
    ahead_HD, weight, best_H = hidden_HD, 1.0, torch.full((len(heads_HVD),), math.inf, dtype=torch.float64)
    for _ in range(1500):
        logits_HV = torch.einsum("hvd,hd->hv", heads_HVD, ahead_HD)
        gradient_HD = torch.einsum("hv,hvd->hd", logits_HV.softmax(dim=1) - targets_HV, heads_HVD)
        next_HD = ahead_HD - length_H1 * gradient_HD
        next_HD = next_HD * (radius / next_HD.norm(dim=1, keepdim=True)).clamp_max(1)
        next_weight = (1 + math.sqrt(1 + 4 * weight**2)) / 2
        ahead_HD = next_HD + (weight - 1) / next_weight * (next_HD - hidden_HD)
        hidden_HD, weight = next_HD, next_weight
        best_H = torch.minimum(best_H, losses(heads_HVD, targets_HV, hidden_HD))
    return best_H


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound_never_exceeds_what_direct_optimisation_reaches_and_lies_within_its_gap(shape: Shape) -> None:
    heads_HVD, targets_HV = random_heads(shape, seed=0)
    radius = math.sqrt(shape.hidden)
    best_H = optimise_directly(heads_HVD, targets_HV, radius)
    for head_VD, target_V, best in zip(heads_HVD, targets_HV, best_H.tolist(), strict=True):
        solution = solve(HeadRows.of(head_VD), target_V[None], radius)
        lower, upper = float(solution.lower_B), float(solution.upper_B)
        assert lower <= best + 1e-9
        # the direct optimum is itself off by 1e-6 at most (1,500 steps)
        assert best <= upper + 1e-6
        assert upper - lower <= TOLERANCE
        assert float(solution.hidden_BD.norm()) <= radius * (1 + 1e-12)


def test_many_targets_at_once_are_solved_as_each_alone() -> None:
    head_VD = random_heads(SHAPES[3], seed=1)[0][0]
    targets_BV = random_heads(SHAPES[3], seed=2)[1]
    together = solve(HeadRows.of(head_VD), targets_BV, math.sqrt(8))
    for b in range(0, HEADS, 7):
        alone = solve(HeadRows.of(head_VD), targets_BV[b : b + 1], math.sqrt(8))
        assert abs(float(alone.lower_B) - float(together.lower_B[b])) <= TOLERANCE


def test_descent_that_is_cut_short_still_gives_a_bound() -> None:
    """The bound holds without convergence."""
    shape = SHAPES[3]
    heads_HVD, targets_HV = random_heads(shape, seed=3)
    best_H = optimise_directly(heads_HVD[:20], targets_HV[:20], math.sqrt(shape.hidden))
    for head_VD, target_V, best in zip(heads_HVD, targets_HV, best_H.tolist(), strict=False):
        lower = float(solve(HeadRows.of(head_VD), target_V[None], math.sqrt(shape.hidden), max_steps=3).lower_B)
        assert lower <= best + 1e-9


def test_bound_of_some_rows_and_the_mean_of_the_others_holds_for_all() -> None:
    head_VD, target_V = random_heads(SHAPES[4], seed=4)[0][0], torch.zeros(60, dtype=torch.float64)
    target_V[0] = 1
    whole = solve(HeadRows.of(head_VD), target_V[None], 4.0)
    others_D = head_VD[30:].mean(dim=0, keepdim=True)
    rows = HeadRows(
        torch.cat([head_VD[:30], others_D]),
        torch.tensor([0.0] * 30 + [math.log(30)], dtype=torch.float64),
        torch.cat([head_VD[:30].norm(dim=1), head_VD[30:].norm(dim=1).mean()[None]]),
    )
    target_M = torch.zeros(31, dtype=torch.float64)
    target_M[0] = 1
    part = solve(rows, target_M[None], 4.0)
    subset = solve(HeadRows.of(head_VD[:30]), target_V[None, :30], 4.0)
    assert float(part.lower_B) <= float(whole.upper_B)
    assert float(subset.upper_B) < float(part.lower_B)  # the mean row tightens the bound


@dataclass(frozen=True)
class Bf16Found:
    """The smallest loss that bf16 forward passes reached, and the two bounds."""

    smallest: float
    exact_bound: float
    bf16_bound: float


def reach_in_bf16(seed: int) -> Bf16Found:
    """Try hidden states around the optimum in a bf16 norm and head."""
    generator = torch.Generator().manual_seed(seed)
    head_VD = torch.randn(200, 64, generator=generator).mul(0.2).bfloat16()
    norm_D = (1 + 0.3 * torch.randn(64, generator=generator)).bfloat16()
    head_VD[:20] = (
        0.02 * torch.randn(64, generator=generator) + 1e-3 * torch.randn(20, 64, generator=generator)
    ).bfloat16()
    target_V = F.one_hot(torch.tensor(0), 200).double()
    rows = HeadRows.of(head_VD.double() * norm_D.double())
    exact, bf16 = (solve(rows, target_V[None], 8.0, **options) for options in ({}, {"precision": BF16}))
    state_ND = exact.hidden_BD + 0.02 * torch.randn(4000, 64, generator=generator, dtype=torch.float64)
    state_ND = 8 * state_ND / state_ND.norm(dim=1, keepdim=True)
    hidden_ND = norm_D * state_ND.bfloat16()  # two roundings, as in GLM-4's norm
    loss_N = F.cross_entropy((hidden_ND @ head_VD.T).double(), torch.zeros(4000, dtype=torch.long), reduction="none")
    return Bf16Found(float(loss_N.min()), float(exact.lower_B), float(bf16.lower_B))


def test_bf16_bound_holds_for_bf16_forward_passes() -> None:
    """The exact bound does not hold for them, as its label states; the bf16 bound is a few per cent lower."""
    found = [reach_in_bf16(seed) for seed in range(20)]
    assert all(case.bf16_bound <= case.smallest for case in found)
    assert any(case.smallest < case.exact_bound for case in found)
    assert all(case.bf16_bound > 0.9 * case.exact_bound > 0 for case in found)
