"""The specification's loss is exact where softmax over a large vocabulary is not, and knows what most trainers compute.

Run: pytest tests/testing/specification/test_reference.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from glm4ft.testing.replay.judge_gradient import _counts
from glm4ft.testing.specification.reference import Reference

VOCABULARY, POSITIONS, HIDDEN = 151_552, 20, 32


class WideHead(Reference):
    """A head of GLM-4's vocabulary whose rows have much in common, as those of pretrained heads; no body."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.weight = 3 + 0.5 * torch.randn(VOCABULARY, HIDDEN, generator=draw)
        hidden = torch.randn(POSITIONS, HIDDEN, generator=draw)
        self.states = {"hidden": hidden - hidden.mean(1, keepdim=True)}
        ids = torch.randint(0, VOCABULARY, (POSITIONS,), generator=draw)
        self.rows = [(tuple(ids.tolist()), tuple(ids.tolist()))]

    def hidden(self, input_ids: Any, trained: Any, kept: Any = None) -> torch.Tensor:
        states: torch.Tensor = trained["hidden"]
        return states

    def logits(self, hidden_TD: torch.Tensor, trained: Any) -> torch.Tensor:
        return hidden_TD @ self.weight.T

    def by_torch(self, dtype: torch.dtype) -> torch.Tensor:
        """The gradient that torch's cross entropy gives for these logits in a dtype."""
        hidden = self.states["hidden"].clone().requires_grad_(True)
        logits, targets = self.logits(hidden[:-1], {}), torch.tensor(self.rows[0][1][1:])
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.to(dtype), targets), hidden)
        return gradient


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_softmax_is_exact_and_most_trainers_is_known() -> None:
    """On x86-64 CPUs torch's softmax in fp32 is off by 1e-5 and more here, so that the two differ."""
    head = WideHead()
    exact, rounded = (head.by_torch(dtype) for dtype in (torch.float64, torch.float32))
    assert off(head.gradient(head.rows, head.states)["hidden"], exact) < 1e-6
    assert off(head.gradient(head.rows, head.states, dtype=torch.float32)["hidden"], rounded) < 1e-6


@pytest.mark.parametrize(
    ("factors", "words", "factor"),
    [
        ([1.00004, 1.00004], "", None),
        ([0.5, 0.5], "it is 0.5 times the token mean", 0.5),
        ([1.0, 0.0], "1 of 2 micro-batches lost: number 2", None),
    ],
)
def test_a_factor_of_one_is_no_cause(factors: list[float], words: str, factor: float | None) -> None:
    assert _counts(factors, 0.01) == (words, factor)
