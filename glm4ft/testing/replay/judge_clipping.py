"""Judges how the gradient of a recorded step was clipped: to the global norm, by one factor."""

from __future__ import annotations

from glm4ft.testing.replay.comparison import dot, relative
from glm4ft.testing.replay.departure import Departures
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.specification.update_rule import clip_factor

SHOWN = 1e-3  # the relative difference of two factors from which on four digits of them tell it


def judge_clipping(step: ReplayedStep) -> Departures:
    """Report a gradient that is not scaled by the one factor that clipping to the global norm gives."""
    limit, raw, clipped = step.history.plan["max_grad_norm"], step.raw, step.step.clipped
    norm, factor = clip_factor(raw, limit, step.norms("raw"))
    size = relative(clipped, {name: factor * tensor for name, tensor in raw.items()})
    length = dot(raw, raw)
    got = dot(clipped, raw) / length if length else factor  # a gradient of zero has no factor to be read off
    if got < 1 - SHOWN:
        step.history.clipped_to.append(got * norm)
    cause = "" if size <= step.limit("clipping") else _clipping_cause(step, norm, got)
    is_factor = abs(got - factor) > SHOWN * factor
    how = f"multiplied by {got:.4g}, not {factor:.4g}" if is_factor else f"multiplied by {got:.4g}, and changed beside"
    text = f"the gradient of norm {norm:.4g} was {how}"
    yield step.depart("clipping", text, cause, size)


def _clipping_cause(step: ReplayedStep, norm: float, got: float) -> str:
    limit, raw, clipped = step.history.plan["max_grad_norm"], step.raw, step.step.clipped
    if raw.keys() != clipped.keys():
        return ""
    if relative(clipped, raw) <= 1e-6:
        return "it was not clipped"
    if relative(clipped, {name: got * tensor for name, tensor in raw.items()}) <= step.limit("clipping"):
        if norm < limit and abs(got * norm / limit - 1) <= 1e-3:
            return "the coefficient is inverted: a small gradient is scaled up to the limit"
        scale = step.loss_factor.scale
        if scale > 1 and limit and abs(got * norm * scale / limit - 1) <= 1e-3:
            return f"it was clipped before the loss scale of {scale:g} was divided out"
        lengths = step.history.clipped_to
        if len(lengths) < 2:
            return ""  # the limit may be another, or the norm: two steps tell them apart
        if max(lengths) - min(lengths) <= 1e-3 * max(lengths):
            return f"the limit is {got * norm:.4g}, " + (f"not {limit:g}" if limit else "and none was asked for")
        return "the factor is computed from a norm other than the global one"
    own = {name: float((clipped[name] * g).sum() / (g * g).sum()) for name, g in raw.items() if g.any()}
    largest = max(float(tensor.abs().max()) for tensor in clipped.values())
    candidates = {
        "each parameter or group is clipped by its own norm": {n: own.get(n, 1.0) * g for n, g in raw.items()},
        "it is clipped by value": {name: tensor.clamp(-largest, largest) for name, tensor in raw.items()},
    }
    fitting = [words for words, told in candidates.items() if relative(clipped, told) <= step.limit("clipping")]
    return fitting[0] if len(fitting) == 1 else ""
