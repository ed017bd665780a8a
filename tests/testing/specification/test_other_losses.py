"""Losses other than cross entropy are named from their gradient, with their number; cross entropy has no such name.

Run: pytest tests/testing/specification/test_other_losses.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from glm4ft.testing.specification.other_losses import name_loss

TOKENS, HIDDEN, VOCABULARY = 8, 24, 200
Logits = torch.Tensor


def smoothed(logits: Logits, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, label_smoothing=0.1)


def penalised(logits: Logits, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets) + 1e-2 * logits.logsumexp(1).square().mean()


def tempered(logits: Logits, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits / 1.5, targets)


def capped(logits: Logits, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(30 * (logits / 30).tanh(), targets)


def twice(logits: Logits, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.softmax(1), targets)


def with_margin(logits: Logits, targets: torch.Tensor) -> torch.Tensor:
    return F.multi_margin_loss(logits, targets)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (smoothed, "label smoothing of 0.1"),
        (penalised, "a penalty of 0.01 times the squared log-partition is added (z-loss)"),
        (tempered, "logits are divided by 1.5, as by a temperature"),
        (capped, "logits are capped at 30 by tanh"),
        (twice, "softmax is applied before a loss that applies it itself"),
        (with_margin, ""),
        (F.cross_entropy, ""),
    ],
    ids=["smoothed", "penalised", "tempered", "capped", "softmax twice", "margin", "cross entropy"],
)
@pytest.mark.parametrize("seed", range(2))
def test_loss_is_named_by_its_gradient(loss: Callable[..., torch.Tensor], name: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    (gradient,) = torch.autograd.grad(loss(hidden @ weight.T, targets), hidden)
    assert name_loss(hidden, gradient, targets, weight, 1e-3) == name
