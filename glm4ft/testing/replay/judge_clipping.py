"""Judges how the gradient of a recorded step was clipped: to the global norm, by one factor."""

from __future__ import annotations

import math

from glm4ft.testing.recording.trace import Tensors
from glm4ft.testing.replay.comparison import dot, relative
from glm4ft.testing.replay.departure import Departures
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.specification.update_rule import clip_factor


def judge_clipping(step: ReplayedStep) -> Departures:
    """Report a gradient that is not scaled by the one factor that clipping to the global norm gives."""
    limit, raw, clipped = step.history.plan["max_grad_norm"], step.raw, step.step.clipped
    norm, factor = clip_factor(raw, limit, step.norms("raw"))
    size = relative(clipped, {name: factor * tensor for name, tensor in raw.items()})
    length = dot(raw, raw)
    got = dot(clipped, raw) / length if length else factor  # a gradient of zero has no factor to be read off
    cause = "" if size <= step.limit("clipping") else _clipping_cause(step, norm, got)
    text = f"the gradient of norm {norm:.4g} was multiplied by {got:.4g}, not {factor:.4g}"
    yield step.depart("clipping", text, cause, size)


def _clipping_cause(step: ReplayedStep, norm: float, got: float) -> str:
    limit, raw, clipped = step.history.plan["max_grad_norm"], step.raw, step.step.clipped
    if raw.keys() != clipped.keys():
        return ""
    if relative(clipped, raw) <= 1e-6:
        return "it was not clipped"
    cosine = got * norm / math.sqrt(dot(clipped, clipped) or 1.0)
    if cosine >= 1 - 1e-6:
        if norm < limit and abs(got * norm / limit - 1) <= 1e-3:
            return "the coefficient is inverted: a small gradient is scaled up to the limit"
        scale = step.loss_scale
        if scale > 1 and limit and abs(got * norm * scale / limit - 1) <= 1e-3:
            return f"it was clipped before the loss scale of {scale:g} was divided out"
        return "the factor is computed from a norm other than the global one"
    if _is_parallel(raw, clipped):
        return "each parameter or group is clipped by its own norm"
    return f"its direction changed (cosine {cosine:.4f}): clipped by value"


def _is_parallel(raw: Tensors, clipped: Tensors) -> bool:
    """Whether clipping kept the direction of each parameter's gradient."""
    for name, gradient in raw.items():
        a, b = gradient.double().flatten(), clipped[name].double().flatten()
        lengths = float(a.norm() * b.norm())
        if lengths and not float(a @ b) >= (1 - 1e-6) * lengths:
            return False
    return True
