"""Losses that trainers compute in place of cross entropy, most with one number that is fitted to a recorded gradient.

Shapes: N supervised tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F

Loss = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
GOLDEN = (math.sqrt(5) - 1) / 2
COMPARED = 64  # entries of the gradient of each token, which tell one number: all of them take minutes on a real head
SEARCHED = 40  # steps of the golden section, each of which narrows the range to 0.618 of it


def _smoothed(logits_NV: torch.Tensor, targets_N: torch.Tensor, share: float) -> torch.Tensor:
    return F.cross_entropy(logits_NV, targets_N, label_smoothing=share, reduction="sum")


def _penalised(logits_NV: torch.Tensor, targets_N: torch.Tensor, factor: float) -> torch.Tensor:
    penalty = logits_NV.logsumexp(1).square().sum()
    return F.cross_entropy(logits_NV, targets_N, reduction="sum") + factor * penalty


def _tempered(logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.cross_entropy(logits_NV / temperature, targets_N, reduction="sum")


def _capped(logits_NV: torch.Tensor, targets_N: torch.Tensor, limit: float) -> torch.Tensor:
    return F.cross_entropy(limit * (logits_NV / limit).tanh(), targets_N, reduction="sum")


def _softmax_twice(logits_NV: torch.Tensor, targets_N: torch.Tensor, _: float) -> torch.Tensor:
    return F.cross_entropy(logits_NV.softmax(1), targets_N, reduction="sum")


# By what messages say of the number. Sources: label smoothing, arXiv 1512.00567, section 7; the penalty on the
# log-partition (z-loss), arXiv 2204.02311, section 5; capped logits, Gemma 2, arXiv 2408.00118, section 2.
LOSSES: Mapping[str, tuple[Loss, float, float]] = {
    "label smoothing of {}": (_smoothed, 1e-5, 0.9),
    "a penalty of {} times the squared log-partition is added (z-loss)": (_penalised, 1e-7, 1.0),
    "logits are divided by {}, as by a temperature": (_tempered, 0.05, 20.0),
    "logits are capped at {} by tanh": (_capped, 1.0, 200.0),
    "softmax is applied before a loss that applies it itself": (_softmax_twice, 1.0, 1.0),
}


def name_loss(
    hidden_ND: torch.Tensor, gradient_ND: torch.Tensor, targets_N: torch.Tensor, weight_VD: torch.Tensor, limit: float
) -> str:
    """The one loss that gives a recorded gradient, up to a factor on all of it; "" if none does, or several do.

    Args:
        hidden_ND: The output of the final norm that predicts each target.
        gradient_ND: The gradient of the loss with respect to it.
        targets_N: The targets.
        weight_VD: The weight of the output head.
        limit: The largest relative error that passes.
    """
    logits_NV = (hidden_ND.to(weight_VD.device).float() @ weight_VD.detach().float().T).double().cpu()
    compared = slice(None, None, -(-weight_VD.shape[1] // COMPARED))
    gradient, columns_VC = (t.detach()[:, compared].double().cpu() for t in (gradient_ND, weight_VD))

    def error(loss: Loss, number: float) -> float:
        given = logits_NV.clone().requires_grad_()
        (by_logits_NV,) = torch.autograd.grad(loss(given, targets_N, number), given)
        told = by_logits_NV @ columns_VC
        factor = (told * gradient).sum() / told.square().sum().clamp_min(1e-300)
        return float((gradient - factor * told).norm() / gradient.norm())

    found = []
    for words, (loss, low, high) in LOSSES.items():
        number = _least(partial(error, loss), low, high) if low < high else low
        if error(loss, number) <= limit:
            found.append(words.format(f"{number:.3g}"))
    return found[0] if len(found) == 1 else ""


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """The positive argument of the least value of a function that falls and then rises, by the golden section."""
    for _ in range(SEARCHED):
        ratio = (high / low) ** GOLDEN
        if function(high / ratio) < function(low * ratio):
            high = low * ratio
        else:
            low = high / ratio
    return math.sqrt(low * high)
