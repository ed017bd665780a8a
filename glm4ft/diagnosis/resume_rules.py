"""A rule about jumps of the loss at one step that stay: what a run that was resumed has lost."""

from __future__ import annotations

import statistics

from glm4ft.diagnosis.curve import Jump, find_jump, peak_rate
from glm4ft.diagnosis.curve_rules import HIGH_RATE
from glm4ft.diagnosis.evidence import CurvePoint, Evidence
from glm4ft.diagnosis.finding import Finding

NORM_CHANGED = 1.5  # the factor by which the median norm changes at the jump, up or down
RATE_CHANGED = 0.2  # relative change of the rate from one logged point to the next; smooth schedules change less
AS_AT_FIRST = 0.25  # share of the way from the level before to the first losses, within which a loss is back there
DESTROYED = 2.0  # a loss above this multiple of the run's first is no model that was loaded: the run diverged
_NEAR = 5  # points on each side whose norms are compared


def resume_lost_state(evidence: Evidence) -> Finding | None:
    """The loss jumps at one step and stays, as a resume that loads only part of the state makes it."""
    points = [p for p in evidence.curve if p.loss is not None]
    losses = [p.loss or 0.0 for p in points]
    jump = find_jump(losses)
    if jump is None:
        return None
    signs = _signs(evidence, points, jump)
    norms = _norms(points, jump.at)
    has_norm_jump = norms is not None and not 1 / NORM_CHANGED < norms[1] / max(norms[0], 1e-30) < NORM_CHANGED
    is_destroyed = jump.after > DESTROYED * statistics.median(losses[:3]) or peak_rate(evidence.curve) >= HIGH_RATE
    if not signs and (is_destroyed or not (has_norm_jump or norms is None)):
        return None
    step = points[jump.at].step
    level = f"the loss jumps from {jump.before:.3f} to {jump.after:.3f}"
    if norms is not None and has_norm_jump:
        level += f" and the gradient norm from {norms[0]:.3g} to {norms[1]:.3g}"
    what, remedy = _lost(losses, points, jump)
    return Finding(
        "resume-lost-state",
        "persistence",
        f"At step {step} {level}, within one step: a resume that lost state. {what}",
        (
            *(signs or ("the log itself shows no resume; a change of data or code at that step looks the same",)),
            f"the run began at {statistics.median(losses[:3]):.3f}; the last losses are {jump.later:.3f}",
        ),
        remedy,
        0.9 if signs else 0.8,
    )


def _signs(evidence: Evidence, points: list[CurvePoint], jump: Jump) -> tuple[str, ...]:
    """What else says that the run was resumed at the jump."""
    last, first = points[jump.at - 1], points[jump.at]
    found = []
    if any(last.step <= step <= first.step for step in evidence.sources.resumed):
        found.append(f"the log goes back and begins anew at step {first.step}")
    saved = [step for step in evidence.sources.checkpoints if last.step <= step < first.step]
    every = int(evidence.options.get("save_steps") or 0)
    if saved:
        found.append(f"there is a checkpoint of step {saved[-1]}, just before it")
    elif every > 1 and first.step // every > (last.step - 1) // every and last.step >= every:
        found.append(f"checkpoints were saved every {every} steps, so one just before it")
    if _has_new_rate(points, jump.at):
        found.append(f"the learning rate goes from {last.lr:.2g} to {first.lr:.2g} there")
    if last.epoch is not None and first.epoch is not None and first.epoch < last.epoch:
        found.append(f"the epoch goes from {last.epoch:.2f} back to {first.epoch:.2f} there")
    return tuple(found)


def _has_new_rate(points: list[CurvePoint], at: int) -> bool:
    last, first = points[at - 1].lr, points[at].lr
    return bool(last) and first is not None and abs(first / (last or 1.0) - 1) > RATE_CHANGED


def _norms(points: list[CurvePoint], at: int) -> tuple[float, float] | None:
    """The median gradient norms before and after a point; None if they were not logged."""
    before = [p.grad_norm for p in points[max(0, at - _NEAR) : at] if p.grad_norm is not None]
    after = [p.grad_norm for p in points[at : at + _NEAR] if p.grad_norm is not None]
    return (statistics.median(before), statistics.median(after)) if before and after else None


def _lost(losses: list[float], points: list[CurvePoint], jump: Jump) -> tuple[str, str]:
    """What was lost, as far as the log shows it, and what to do."""
    began = statistics.median(losses[:3])
    if began > jump.before and abs(jump.after - began) <= AS_AT_FIRST * (began - jump.before):
        return (
            "The loss is back where the run began, so the trained weights were not loaded: the run started over.",
            "give the checkpoint to the trainer (resume_from_checkpoint), not only to the model, and compare an "
            "adapter tensor after loading with the file",
        )
    if _has_new_rate(points, jump.at):
        return (
            "The schedule begins anew there, so the optimizer and its rate were not restored: AdamW without its "
            "moments takes its largest steps first.",
            "keep optimizer.pt and scheduler.pt with the checkpoint (save_only_model: false) and resume from it",
        )
    if jump.later < jump.before + 0.5 * (jump.after - jump.before):
        return (
            "The loss comes down again, so the weights were there; what is missing is the optimizer's moments, or the "
            "place in the data.",
            "keep optimizer.pt, scheduler.pt and rng_state.pth with the checkpoint, and resume from it",
        )
    return (
        "The loss does not come down again and the rate goes on, so it is neither the schedule nor the optimizer's "
        "moments alone: weights that were loaded in part or onto another base, another normalisation of the loss, or "
        "other data.",
        "evaluate the checkpoint before that step on the rows of the first losses after it: if its loss is low, the "
        "resume did not load it; compare base, adapter scale, accumulation and data of the two starts",
    )
