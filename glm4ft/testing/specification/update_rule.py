"""What becomes of a gradient: its clipping, the learning rate of its step, and AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from glm4ft.testing.recording.trace import Tensors


def clip_factor(gradients: Tensors, max_norm: float, norms: Mapping[str, float] | None = None) -> tuple[float, float]:
    """The global norm of the gradients and the factor that clipping multiplies them by.

    Args:
        gradients: The gradient of each parameter, or a sample of it.
        max_norm: The largest norm; 0 for none.
        norms: The norms of the gradients that are samples.
    Returns:
        ``(norm, factor)``; the factor is ``min(1, max_norm / (norm + 1e-6))``, and 1 if ``max_norm`` is 0.
    Source: ``torch.nn.utils.clip_grad_norm_``.
    """
    known = norms or {}
    norm = math.hypot(*(known.get(n, 0.0) or float(g.double().norm()) for n, g in gradients.items()))
    return norm, min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def scheduled_rate(step: int, plan: Mapping[str, Any], total_steps: int) -> float:
    """The learning rate of an optimizer step.

    Args:
        step: The number of the step, from 1.
        plan: The plan, with ``learning_rate`` (the peak), ``schedule`` and ``warmup_steps``.
        total_steps: The number of steps of the whole run.
    Source: the closed forms of transformers' ``get_scheduler``: linear warm-up from 0 over ``warmup_steps``, then
        constant, linear to 0, or half a cosine to 0.
    """
    done, warmup = step - 1, plan["warmup_steps"]
    if done < warmup:
        return float(plan["learning_rate"] * done / warmup)
    share = (done - warmup) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[plan["schedule"]]
    return float(plan["learning_rate"] * shape)


def warmups_above_zero(plan: Mapping[str, Any]) -> list[list[float]]:
    """The learning rates of the warm-up in pipelines whose first step already moves.

    Args:
        plan: The plan, with ``learning_rate`` and ``warmup_steps``.
    Returns:
        The learning rate of each warm-up step, in each of the forms that are in use.
    Source: karpathy/nanoGPT's ``train.py``, ``(done + 1) / (warmup + 1)``; Megatron-LM's scheduler, which counts the
        step that it is about to take: ``(done + 1) / warmup``.
    """
    peak, warmup = float(plan["learning_rate"]), int(plan["warmup_steps"])
    return [[peak * (done + 1) / divisor for done in range(warmup)] for divisor in (warmup + 1, max(warmup, 1))]


class AdamW:
    """AdamW in float64, with its moments kept from step to step.

    Args:
        betas: The decay rates of the first and second moment.
        eps: The term added to the root of the second moment.
        weight_decay: The decoupled weight decay, applied to every trained parameter but those of ``decays``.
        decays: The weight decay of parameters that have another, by their names.
    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """

    def __init__(
        self, betas: tuple[float, float], eps: float, weight_decay: float, decays: Mapping[str, float] | None = None
    ) -> None:
        self.betas, self.eps, self.weight_decay, self.steps = betas, eps, weight_decay, 0
        self.decays = decays or {}
        self.first, self.second = Tensors(), Tensors()

    def update(self, before: Tensors, gradients: Tensors, rates: Mapping[str, float]) -> Tensors:
        """Advance the moments by one step and return the parameters after it.

        Args:
            before: The trained parameters.
            gradients: The gradient of each parameter that has one.
            rates: The learning rate of each parameter.
        """
        self.steps += 1
        beta1, beta2 = self.betas
        after = {}
        for name, gradient in gradients.items():
            g = gradient.double()
            self.first[name] = beta1 * self.first.get(name, torch.zeros_like(g)) + (1 - beta1) * g
            self.second[name] = beta2 * self.second.get(name, torch.zeros_like(g)) + (1 - beta2) * g * g
            root = (self.second[name] / (1 - beta2**self.steps)).sqrt() + self.eps
            direction = self.first[name] / (1 - beta1**self.steps) / root
            rate, decay = rates[name], self.decays.get(name, self.weight_decay)
            after[name] = before[name].double() * (1 - rate * decay) - rate * direction
        return after
