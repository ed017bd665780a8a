"""Rules about runs in which nothing moves: no gradient, a rate of zero, or updates without effect."""

from __future__ import annotations

import statistics

from glm4ft.diagnosis.curve import LEAST_STEPS, fall, peak_rate
from glm4ft.diagnosis.curve_rules import ENDED, HIGH_RATE, LEARNT_LOSS
from glm4ft.diagnosis.evidence import CurvePoint, Evidence
from glm4ft.diagnosis.finding import Finding

CONSTANT = 1e-6  # relative difference below which losses are equal; steps that change the weights differ by more
FLAT_STEPS = 5
EFFECT = (
    "create the optimizer from the parameters of the model that is trained, after adapters are attached and wrapped; "
    "look for a step that is skipped (fp16), and for bf16 weights that round small updates away"
)
FELL = 0.05  # the share of a loss by which it falls in training, and not in the noise of its batches alone
NO_NORMS = 3  # gradient norms of exactly 0, from which it is no accident


def no_gradient(evidence: Evidence) -> Finding | None:
    """The gradient norm is exactly 0, from the first logged step or from a later one on."""
    known = [p for p in evidence.curve if p.grad_norm is not None]
    moved = [i for i, p in enumerate(known) if p.grad_norm != 0]
    start = moved[-1] + 1 if moved else 0
    zeros = known[start:]
    if len(zeros) < NO_NORMS or not any(p.loss for p in zeros):
        return None
    losses = [p.loss for p in zeros if p.loss is not None]
    facts = (
        f"{len(zeros)} of {len(known)} logged gradient norms are exactly 0",
        f"the loss meanwhile: {losses[0]:.4f} to {losses[-1]:.4f}",
    )
    trained = fall(losses)
    if trained.is_falling and trained.change < -FELL * losses[0]:
        return Finding(
            "norms-not-logged",
            "side-effects",
            "The gradient norm is logged as exactly 0, and yet the loss falls: the logged norm is not that of the "
            "gradients, which were taken away before it was computed, as DeepSpeed does in its own step.",
            facts,
            "log the norm that the engine knows (model.get_global_grad_norm()), or compute it before the step: without "
            "it no spike is seen",
            0.6,
        )
    if not moved:
        return Finding(
            "no-gradient",
            "gradient",
            "No gradient from the first step on: the norm is exactly 0 at every logged step"
            + (f", and the loss stays at {losses[-1]:.4f}." if _is_constant(losses) else ".")
            + " Nothing was ever trained.",
            facts,
            "count the parameters that require a gradient: a loaded adapter needs is_trainable=True, and gradient "
            "checkpointing on a frozen base enable_input_require_grads(); look for a detached or no_grad forward",
        )
    return Finding(
        "training-stopped",
        "gradient",
        f"The gradient vanishes at step {zeros[0].step}: up to step {known[start - 1].step} it had a norm of "
        f"{known[start - 1].grad_norm:.3g}, from there on exactly 0, so the updates have no effect any more.",
        facts,
        "look for what froze the parameters at that step: a save, an evaluation, a phase of the schedule; or whether "
        "the model's output has become constant",
        0.95,
    )


def rate_zero(evidence: Evidence) -> Finding | None:
    """The learning rate is 0 at every logged step."""
    rates = [p.lr for p in evidence.curve if p.lr is not None]
    if len(rates) < NO_NORMS or any(rates):
        return None
    return Finding(
        "rate-zero",
        "schedule",
        f"The learning rate is 0 at all {len(rates)} logged steps: nothing was trained.",
        (f"steps {evidence.curve[0].step} to {evidence.curve[-1].step}",),
        "set a learning rate; look for a schedule that was given no steps, that is never stepped, or whose updates are "
        "all skipped (fp16)",
    )


def losses_repeat(evidence: Evidence) -> Finding | None:
    """The same losses come back in the same order, epoch after epoch: the rows are the same, and so is the model."""
    losses = evidence.losses
    if len(losses) < LEAST_STEPS or _is_constant(losses):
        return None
    periods = range(2, len(losses) // 3 + 1)  # twice may be a run that was started again
    period = next((n for n in periods if all(a == b for a, b in zip(losses, losses[n:], strict=False))), None)
    if period is None:
        return None
    return Finding(
        "updates-without-effect",
        "update",
        f"The losses repeat after every {period} logged steps to the last digit: the same rows come back, and the "
        "model that they meet is the same, so no update has changed it.",
        (f"the first {min(period, 4)}: {', '.join(f'{loss:.4f}' for loss in losses[: min(period, 4)])}",),
        EFFECT,
        0.9,
    )


def training_stopped(evidence: Evidence) -> Finding | None:
    """The loss is constant to the last digit from some step on, although there are gradients and a rate."""
    points = [p for p in evidence.curve if p.loss]
    if len(points) < LEAST_STEPS or not evidence.loss > LEARNT_LOSS:
        return None
    last = points[-1].loss or 0.0
    start = len(points)
    while start and abs((points[start - 1].loss or 0.0) - last) <= CONSTANT * last:
        start -= 1
    flat = points[start:]
    # where the rate has ended, the schedule is to blame
    if len(flat) < FLAT_STEPS or not _has_rate(flat, peak_rate(points)):
        return None
    if start == 0 or (start == 1 and last > (points[0].loss or 0.0)):
        return _constant(flat)
    return Finding(
        "training-stopped",
        "side-effects",
        f"From step {flat[0].step} on the loss stays at {last:.4f} to the last digit: the updates have no effect any "
        "more.",
        (f"{len(flat)} equal losses", f"loss before: {points[0].loss:.4f}"),
        "look for what froze the parameters at that step: a save, an evaluation, a conversion",
        0.9,
    )


def _constant(flat: list[CurvePoint]) -> Finding:
    """The loss does not move. A rate that is high explains it by a model that the first updates have destroyed."""
    peak, loss = peak_rate(flat), flat[0].loss or 0.0
    facts = (f"{len(flat)} equal losses, from step {flat[0].step} on", f"peak learning rate {peak:.2g}")
    if peak >= HIGH_RATE:
        return Finding(
            "rate-too-high",
            "update",
            f"The loss is constant at {loss:.4f} from step {flat[0].step} on, with a learning rate of {peak:.2g}: a "
            "rate too high to learn anything. The first updates have driven the model to one output for every input.",
            facts,
            "divide the learning rate by 10 to 100 (2e-4 is usual for LoRA on a 9B base, 1e-5 for all weights), and "
            "warm up over some steps",
            0.8,
        )
    norms = [p.grad_norm for p in flat if p.grad_norm]
    return Finding(
        "updates-without-effect",
        "update",
        f"The loss is constant at {loss:.4f} from the first logged step on, although "
        + ("there are gradients and " if norms else "")
        + "the rate is not 0: no update reaches the weights that the loss is computed with.",
        (*facts, *([f"median gradient norm {statistics.median(norms):.3g}"] if norms else [])),
        EFFECT,
        0.8,
    )


def _has_rate(points: list[CurvePoint], peak: float) -> bool:
    rates = [p.lr for p in points if p.lr is not None]
    return not rates or max(rates) > ENDED * peak


def _is_constant(losses: list[float]) -> bool:
    return max(losses) - min(losses) <= CONSTANT * max(losses)
