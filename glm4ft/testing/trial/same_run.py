"""Where two runs that should be one part ways, bit by bit."""

from __future__ import annotations

import torch

from glm4ft.testing.recording.trace import Step, Tensors
from glm4ft.testing.trial.runs import RecordedRun


def describe_divergence(whole: RecordedRun, other: RecordedRun, done: int = 0) -> str:
    """What a run does otherwise than another one from some step on.

    Args:
        whole: a run from its first step on.
        other: a run that begins where ``whole`` had done some steps.
        done: how many.
    Returns:
        The first difference, in the order in which a step uses things; "" if there is none.
    """
    rest = whole.trace.steps[done:]
    if len(other.trace.steps) != len(rest):
        return f"{len(other.trace.steps)} steps follow, not {len(rest)}"
    for offset, (expected, got) in enumerate(zip(rest, other.trace.steps, strict=True)):
        number = done + offset + 1
        if _differ(expected.before, got.before):
            where = f"the parameters changed before step {number}"
            return where if offset else "it does not start from the parameters that were there then"
        if sorted(whole.order[number - 1]) != sorted(other.order[offset]):
            return f"step {number} sees other rows"
        rates = [float(step.groups[0].settings["lr"]) for step in (expected, got)]
        if rates[0] != rates[1]:
            return f"the rate at step {number} is {rates[1]:.6g}, not {rates[0]:.6g}"
        if _differ(expected.after, got.after):
            same_order = whole.order[number - 1] == other.order[offset]
            return f"the parameters differ after step {number}{_cause(expected, got, same_order)}"
    return ""


def changed_after_last_step(run: RecordedRun) -> bool:
    """Whether the model that a run leaves has other trained parameters than its last step made."""
    left = dict(run.model.named_parameters())
    return _differ({name: left[name].detach().cpu() for name in run.trained if name in left}, run.trained)


def _cause(expected: Step, got: Step, same_order: bool) -> str:
    """Why a step from the same parameters on the same rows leads elsewhere, as far as the recordings tell."""
    if any(forward.training for forward in expected.forwards) and not any(f.training for f in got.forwards):
        return ": it ran in eval mode"
    lost = sum(bool(t.any()) and not (name in got.raw and got.raw[name].any()) for name, t in expected.raw.items())
    if lost:
        return f": {lost} of them have no gradient there"
    if not _differ(expected.clipped, got.clipped):
        return " though its gradient is the same: the optimizer's moments or copies of the weights are other ones"
    if _differ(expected.raw, got.raw) and same_order:
        return ", and so does its gradient on the same rows: dropout drew other random numbers"
    return ""


def _differ(one: Tensors, two: Tensors) -> bool:
    return one.keys() != two.keys() or any(not torch.equal(one[name], two[name]) for name in one)
