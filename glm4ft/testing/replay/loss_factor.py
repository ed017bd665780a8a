"""The factor on the loss of a recorded step beside the token mean: a loss scale, a sum divided later, or a mistake."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glm4ft.testing.recording.trace import Step
from glm4ft.testing.replay.comparison import relative
from glm4ft.testing.replay.history import History
from glm4ft.testing.replay.tolerances import MIN_LOSS_SCALE, WEIGHT_LIMITS
from glm4ft.testing.specification.update_rule import clip_factor


@dataclass(frozen=True)
class LossFactor:
    """The factor on the loss of a step beside the token mean.

    Args:
        ratio: The factor, to the precision of a token's recovered weight.
        scale: The part of it that is divided out of the gradient again, as that of fp16 training is; 1 without one.
        is_one: Whether there is no factor.
        is_removed: Whether the optimizer receives the gradient without the factor.
        is_undecided: Whether it may: the loss is a sum over tokens, and clipping hides whether that is divided.
    """

    ratio: float
    scale: float
    is_one: bool
    is_removed: bool = False
    is_undecided: bool = False


def find_loss_factor(step: Step, history: History, ratio: float, num_targets: int) -> LossFactor:
    """Find what becomes of a factor on the loss.

    Args:
        step: The recorded step.
        history: The specification.
        ratio: The median weight of a token in the loss, as a multiple of its weight in the token mean.
        num_targets: The number of supervised tokens in the whole step.
    """
    limit, plan = WEIGHT_LIMITS[history.dtype], history.plan
    is_one = abs(ratio - 1) <= limit
    if not 0 < ratio < math.inf:
        return LossFactor(ratio, 1.0, is_one)
    if plan.get("factor_is_removed") or (not is_one and _is_removed(step, ratio, limit)):
        return LossFactor(ratio, _removed_factor(step, plan["max_grad_norm"], ratio, limit), is_one, not is_one)
    if plan.get("is_only_run") and _is_clipped_sum(step, history, ratio, num_targets, limit):
        return LossFactor(ratio, ratio, is_one, is_undecided=True)
    nearest = 2.0 ** round(math.log2(ratio))
    is_scale = nearest >= MIN_LOSS_SCALE and abs(ratio / nearest - 1) <= limit
    return LossFactor(ratio, nearest if is_scale else 1.0, is_one)


def _is_removed(step: Step, factor: float, limit: float) -> bool:
    """Whether the optimizer received the gradient divided by a factor that the loss was multiplied by."""
    return relative(step.clipped, {name: tensor / factor for name, tensor in step.raw.items()}) <= limit


def _removed_factor(step: Step, max_grad_norm: float, ratio: float, limit: float) -> float:
    """The factor that was divided out: a ratio of weights to rounding, or exactly where nothing was clipped."""
    raw, clipped = (clip_factor(tensors, 0)[0] for tensors in (step.raw, step.clipped))
    return raw / clipped if 0 < clipped < (max_grad_norm or math.inf) * (1 - limit) else ratio


def _is_clipped_sum(step: Step, history: History, factor: float, num_targets: int, limit: float) -> bool:
    """Whether the loss is a sum over tokens, and the optimizer receives the same whether that is divided or not.

    Dividing the gradient by the number of tokens before clipping, as torchtune does, is right; but it leaves no trace
    where clipping to a norm makes both equally long.
    """
    plan = history.plan
    if not any(abs(factor * n - num_targets) <= limit * num_targets for n in (1, plan.get("processes", 1))):
        return False
    norm, clipped = clip_factor(step.raw, plan["max_grad_norm"], step.norms.get("raw"))
    expected = {name: clipped * tensor for name, tensor in step.raw.items()}
    return 0 < plan["max_grad_norm"] < norm / factor and relative(step.clipped, expected) <= limit
