"""Faults of gradient clipping and of the logged gradient norm."""

from __future__ import annotations

import math

import torch

from glm4ft.testing.faults.registry import faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject, trained

ESCAPES = (
    "A norm that is wrong only for sharded parameters (FSDP, DeepSpeed) needs those frameworks and is not seen with "
    "two processes of plain DDP."
)

LOSS_SCALE = 2.0**16

fault = faults_at("clipping")


def norm_of(run: LoopState) -> float:
    """Global L2 norm of the gradient of all trained parameters."""
    return math.sqrt(sum(float(p.grad.pow(2).sum()) for p in trained(run.model) if p.grad is not None))


def multiply(run: LoopState, factor: float) -> None:
    """Multiply the gradient of every trained parameter by a factor."""
    for parameter in trained(run.model):
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


@fault("clip-coefficient-inverted", evidence="DeepSpeed 5150", cause=r"inverted|enlarged|amplified|not clipped")
class ClipCoefficientInverted(Subject):
    """The clipping factor is at least 1 instead of at most 1: large gradients pass, small ones grow."""

    def clip(self, run: LoopState) -> float:
        norm = norm_of(run)
        if run.plan["max_grad_norm"]:
            multiply(run, max(1.0, run.plan["max_grad_norm"] / (norm + 1e-6)))
        return norm


@fault("clip-has-no-effect", evidence="aprender 2112; nano-world-model 22", cause=r"not clipped")
class ClipHasNoEffect(Subject):
    """The gradient norm is computed, but the gradient is not clipped."""

    def clip(self, run: LoopState) -> float:
        return norm_of(run)


@fault("clip-before-unscale", evidence="pytorch/examples 1196; DeepSpeed 2695", cause=r"scale")
class ClipBeforeUnscale(Subject):
    """Gradients are clipped while they still contain the loss scale of half precision."""

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss * LOSS_SCALE)

    def clip(self, run: LoopState) -> float:
        norm = super().clip(run)
        multiply(run, 1 / LOSS_SCALE)
        return norm / LOSS_SCALE


@fault("clip-local-norm", evidence="LLaMA-Factory 10640; DeepSpeed 5411", cause=r"local|own norm|not one factor|each")
class ClipLocalNorm(Subject):
    """Each parameter is clipped by its own norm, not by the global norm."""

    def clip(self, run: LoopState) -> float:
        norm = norm_of(run)
        for parameter in trained(run.model):
            torch.nn.utils.clip_grad_norm_([parameter], run.plan["max_grad_norm"] or math.inf)
        return norm


@fault("limit-hard-coded", evidence="flair 3240; ultralytics 24320", cause=r"the limit is 0\.3, not 1")
class LimitHardCoded(Subject):
    """Gradients are clipped to a norm that is written in the code, whatever was asked for."""

    def clip(self, run: LoopState) -> float:
        return float(torch.nn.utils.clip_grad_norm_(trained(run.model), 0.3))


@fault("clip-by-value", evidence="DeepCrime operator OCG", cause=r"value|direction")
class ClipByValue(Subject):
    """Every entry of the gradient is clipped by value at the limit."""

    def clip(self, run: LoopState) -> float:
        norm = norm_of(run)
        if run.plan["max_grad_norm"]:
            torch.nn.utils.clip_grad_value_(trained(run.model), run.plan["max_grad_norm"])
        return norm


@fault("norm-logged-after-clip", evidence="miles 2132; TrainCheck motivation", cause=r"after clipping|clipped|logged")
class NormLoggedAfterClip(Subject):
    """The logged norm is the one after clipping, so it never shows a spike."""

    def clip(self, run: LoopState) -> float:
        super().clip(run)
        return norm_of(run)
