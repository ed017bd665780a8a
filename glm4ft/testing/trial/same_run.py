"""Finds where two runs that should be identical differ, bit by bit."""

from __future__ import annotations

import torch

from glm4ft.testing.recording.trace import Step, Tensors
from glm4ft.testing.replay.comparison import relative
from glm4ft.testing.replay.history import History
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.replay.tolerances import LIMITS
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.stages import NotApplicable


def describe_divergence(whole: RecordedRun, other: RecordedRun, done: int = 0) -> str:
    """Describe the first difference between two runs that should be identical.

    Args:
        whole: A run from its first step on.
        other: A run that continues from a state of ``whole``.
        done: The number of steps that ``whole`` had taken at that state.
    Returns:
        The first difference, in the order of a step's parts: parameters, rows, learning rate, result; "" if none.
    Raises:
        NotApplicable: If the first difference is the rounding of a gradient from the same parameters and rows: kernels
            chosen by what ran before them round in another way, as those of compiled models do.
    """
    rest = whole.trace.steps[done:]
    if len(other.trace.steps) != len(rest):
        return f"{len(other.trace.steps)} steps follow, not {len(rest)}"
    for offset, (expected, got) in enumerate(zip(rest, other.trace.steps, strict=True)):
        number = done + offset + 1
        if _differ(expected.before, got.before):
            where = f"the parameters changed before step {number}"
            return where if offset else "it starts from other parameters"
        if sorted(whole.order[number - 1]) != sorted(other.order[offset]):
            return f"step {number} trains on other rows"
        rates = [[f"{float(group.settings['lr']):.6g}" for group in step.groups] for step in (expected, got)]
        if rates[0] != rates[1]:
            return f"the learning rate at step {number} is {' and '.join(rates[1])}, not {' and '.join(rates[0])}"
        if _differ(expected.after, got.after):
            same_order = whole.order[number - 1] == other.order[offset]
            sizes = relative(got.raw, expected.raw), relative(_update(got), _update(expected))
            if same_order and sizes[0] > 0 and all(size <= LIMITS[torch.float32] for size in sizes):
                raise NotApplicable(
                    f"not judged bit by bit from step {number} on: gradients of the same parameters and rows differ by "
                    f"rounding ({sizes[0]:.1e}), and so do the updates ({sizes[1]:.1e})"
                )
            return f"the parameters differ after step {number}{_cause(other, expected, got, same_order)}"
    return ""


def explain_by_noise(found: str, without: str) -> str:
    """A divergence of runs with dropout, with its cause.

    Args:
        found: The divergence with dropout; "" if there is none.
        without: The divergence of the same runs without dropout.
    Returns:
        The divergence without dropout if there is one; otherwise random numbers are the cause of the other.
    """
    if not found or without:
        return without or found
    return f"{found}: dropout drew other random numbers, since without dropout the runs are the same"


def changed_after_last_step(run: RecordedRun) -> bool:
    """Whether the trained parameters of a run's model differ from those after its last optimizer step."""
    left = dict(run.model.named_parameters())
    return _differ({name: left[name].detach().cpu() for name in run.trained if name in left}, run.trained)


def _cause(run: RecordedRun, expected: Step, got: Step, same_order: bool) -> str:
    """Why a step from equal parameters on the same rows gives other parameters; "" if the recordings do not show it."""
    if any(forward.training for forward in expected.forwards) and not any(f.training for f in got.forwards):
        return ": it ran in eval mode"
    lost = sum(bool(t.any()) and not (name in got.raw and got.raw[name].any()) for name, t in expected.raw.items())
    if lost:
        return f": {lost} of them have no gradient there"
    if not _differ(expected.clipped, got.clipped):
        return " though its gradient is the same: the optimizer's moments or copies of the weights differ"
    if _differ(expected.raw, got.raw) and same_order:
        return ", and so does its gradient on the same rows" + _forward_cause(run, got)
    return ""


def _forward_cause(run: RecordedRun, step: Step) -> str:
    """Whether the model of a step computes something else than its parameters say."""
    if run.dropout:
        return ""  # the specification drops nothing
    history = History(run.reference, run.known, run.plan, run.trace.dtype)
    replayed = ReplayedStep(1, step, history)
    if all(found.size <= replayed.limit("model") for found in replayed.hidden_states):
        return ""
    return ": the model does not compute what its base and adapters say, e.g. dropout acts, or another LoRA scale"


def _update(step: Step) -> Tensors:
    """What a step added to each parameter."""
    return {name: after - step.before[name] for name, after in step.after.items()}


def _differ(one: Tensors, two: Tensors) -> bool:
    return one.keys() != two.keys() or any(not torch.equal(one[name], two[name]) for name in one)
