"""Rules about numbers that are not finite, and about losses of exactly zero, behind which a log may hide them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from glm4ft.diagnosis.curve import LEAST_STEPS, trend
from glm4ft.diagnosis.evidence import CurvePoint, Evidence
from glm4ft.diagnosis.finding import Finding

# From a loss above this one a log cannot have come down to exactly 0 within one logged step by learning and by rounding
# to four digits; a loss of 0.02 is a mean probability of 0.98.
NOT_YET = 0.02
# A loss below it is that of rows known by heart: the limit of the overfit test.
MEMORISED = 0.01
# The share of steps with a loss of exactly 0 that is no accident.
MANY_ZEROS = 0.05
# Nats by which a loss may be below 0 by rounding alone, where rows are known by heart.
ROUNDED = 1e-3
# The share of its level by which a loss falls that is trained.
FALLEN = 0.1
# The norm before a breakdown is a spike above this multiple of the median norm: the run diverged.
SPIKE = 10.0
PRECISION = "train in bf16 or fp32, with adapters in fp32 and never fp16"


def numerics(evidence: Evidence) -> Finding | None:
    """A number is not finite, or was not and is logged as 0."""
    broken = evidence.adapters.non_finite if evidence.adapters else ()
    is_lost = any(math.isnan(row.loss) for row in evidence.rows if any(t.supervised for t in row.tokens))
    is_lost = is_lost and evidence.adapters is not None
    found = _in_log(evidence)
    if found is None and not (broken or is_lost):
        return None
    facts = [f"{len(broken)} adapters hold NaN or infinity, the first {broken[0]}"] if broken else []
    facts += ["the trained model's loss is NaN"] if is_lost else []
    precision = evidence.options.get("precision")
    facts += [f"by its options the run is in {precision}"] if precision else []
    if found is None:
        text = "The numbers are not finite, in the adapters; nothing can be learnt from there on."
        remedy = f"{PRECISION}; check the initialisation, and lower the learning rate"
        return Finding("numerics", "model", text, tuple(facts), remedy)
    return Finding(found.verdict, found.stage, found.text, (*found.evidence, *facts), found.remedy, found.strength)


def _in_log(evidence: Evidence) -> Finding | None:
    curve = evidence.curve
    bad = [i for i, point in enumerate(curve) if not _is_finite(point)]
    zeros = _hidden_zeros(curve)
    if not bad and zeros is None:
        return None
    facts = tuple(_counted(curve, bad)) if bad else ()
    if bad and all(_is_sound(point) for point in curve[bad[0] :]):
        return _skipped(curve, bad, facts)
    if bad and _is_sound(curve[-1]) and _is_finite(curve[-1]):
        return _passing(curve, bad, facts)
    # an fp16 run may skip its first updates; what breaks it begins where nothing is finite any more
    first = len(curve)
    while first and (first - 1 in bad or (zeros is not None and first - 1 >= zeros)):
        first -= 1
    if first == 0:
        return _from_the_start(curve, facts)
    return _later(curve, first, facts)


def _counted(curve: Sequence[CurvePoint], bad: Sequence[int]) -> Iterator[str]:
    yield f"first step that is not finite: {curve[bad[0]].step}"
    yield f"{len(bad)} of {len(curve)} logged points are not finite"


def _skipped(curve: Sequence[CurvePoint], bad: Sequence[int], facts: tuple[str, ...]) -> Finding:
    """The losses stay finite, so an update with such a gradient was not made: that is what a loss scaler does."""
    where = "from the first logged step on" if bad[0] == 0 else f"from step {curve[bad[0]].step} on"
    is_lasting = len(bad) > 2 and bad == list(range(bad[0], len(curve)))
    after = [point.loss for point in curve[bad[0] :] if point.loss is not None]
    # a loss that falls says that updates are made, whatever is logged as their norm
    falls = len(after) >= LEAST_STEPS and -trend(after).change > FALLEN * statistics.median(after)
    is_sure = is_lasting and not falls
    often = f"at every step {where}" if is_lasting else f"at {len(bad)} of {len(curve)} logged steps"
    effect = (
        "so every update is skipped and nothing is learnt"
        if is_sure
        else "yet the loss falls: updates are made, and the norm that is logged is not theirs"
        if is_lasting
        else "and those updates were skipped"
    )
    return Finding(
        "numerics",
        "gradient",
        f"The gradient norm is not finite {often}, though the losses are: the backward pass overflows in fp16 (loss "
        f"scaling), {effect}.",
        facts,
        f"{PRECISION}; a few skipped updates at the start of an fp16 run are how the loss scale is found",
        0.9 if is_sure else 0.4,
    )


def _passing(curve: Sequence[CurvePoint], bad: Sequence[int], facts: tuple[str, ...]) -> Finding:
    """The loss itself was not finite and is finite again, so the weights were never touched by it."""
    steps = ", ".join(str(curve[i].step) for i in bad[:5])
    return Finding(
        "numerics",
        "rows",
        f"The loss is not finite at step {steps} and is finite again later: no update was made with it. A mean over no "
        "token is not finite either, so these batches probably have no target.",
        facts,
        "look at the rows of these steps: answers that were cut away leave only labels of -100",
        0.6,
    )


def _from_the_start(curve: Sequence[CurvePoint], facts: tuple[str, ...]) -> Finding:
    first, gap = curve[0], curve[0].step
    loss = first.loss
    if loss is not None and math.isfinite(loss) and loss > 0:
        return Finding(
            "numerics",
            "gradient",
            f"The first logged loss, {loss:.4g} at step {first.step}, is finite and the weights were sound; the "
            "gradient is not: the backward pass overflowed, as in fp16 without loss scaling, and the update wrote "
            "NaN into the weights.",
            (*facts, "a logged loss of 0 is a NaN that transformers' log filter left out"),
            f"{PRECISION}: fp16 cannot hold this model's gradients (bf16: true, fp16: false)",
        )
    before = "before any update" if gap == 1 else f"within the first {gap} steps"
    cause = (
        "the forward pass itself fails: weights that were never initialised, an overflow in fp16, or attention over "
        "rows that are masked as a whole"
        if gap == 1
        else "either the forward pass itself fails (fp16, weights that were never initialised) or one of the first "
        "updates wrote NaN into the weights"
    )
    return Finding(
        "numerics",
        "model",
        f"The numbers are not finite from the first logged step on (step {gap}), {before}: {cause}. Nothing can be "
        "learnt from there on.",
        (*facts, *(["a logged loss of 0 is a NaN that transformers' log filter left out"] if loss == 0 else [])),
        f"{PRECISION}; log every step to see whether the first loss is finite; check that each row has a target, and "
        "the logits of the untouched model on one row",
    )


def _later(curve: Sequence[CurvePoint], first: int, facts: tuple[str, ...]) -> Finding:
    last, step = curve[first - 1], curve[first].step
    norms = [p.grad_norm for p in curve[:first] if p.grad_norm is not None and math.isfinite(p.grad_norm)]
    losses = [p.loss for p in curve[:first] if p.loss is not None]
    is_spike = len(norms) > 3 and norms[-1] > SPIKE * statistics.median(norms)
    is_up = len(losses) > 3 and losses[-1] > 1.5 * statistics.median(losses[-10:-1])
    if is_spike or is_up:
        facts = (*facts, f"just before, loss {losses[-1]:.4g}" + (f" and norm {norms[-1]:.3g}" if norms else ""))
    elif last.loss is not None:
        facts = (*facts, f"at step {last.step} the loss was still {last.loss:.4g}")
    cause = "the run had begun to diverge" if is_spike or is_up else "without a sign before it, as an overflow comes"
    hidden = curve[first].loss == 0
    return Finding(
        "numerics",
        "gradient" if not is_up else "update",
        f"The numbers are not finite from step {step} on, {cause}; nothing can be learnt from there on."
        + (" A loss of exactly 0 is a NaN that the log filter left out." if hidden else ""),
        facts,
        ("lower the learning rate, warm up, and clip at 1; " if is_spike or is_up else "")
        + f"{PRECISION}; look at the rows of that step, and go back to a checkpoint before it",
    )


def zero_loss(evidence: Evidence) -> Finding | None:
    """The logged loss is exactly 0 from some step on, or now and then: nothing was counted there."""
    points = [p for p in evidence.curve if p.loss is not None and math.isfinite(p.loss)]
    zeros = [p for p in points if p.loss == 0]
    rest = [p.loss or 0.0 for p in points if p.loss != 0]
    if not zeros or (rest and (len(zeros) < MANY_ZEROS * len(points) or not statistics.median(rest[-5:]) > NOT_YET)):
        return None
    norms = [p.grad_norm for p in zeros if p.grad_norm is not None and math.isfinite(p.grad_norm)]
    where = "from the first logged step on" if not rest else f"at {len(zeros)} of {len(points)} logged steps"
    return Finding(
        "zero-loss",
        "rows",
        f"The loss is exactly 0 {where}. No cross entropy is exactly 0: no token was counted, because every label is "
        "-100, or the loss was NaN and transformers' log filter left it out.",
        (
            f"first step with a loss of 0: {zeros[0].step}",
            f"the gradient norm there is {max(norms):.3g} at most"
            if norms
            else "no finite gradient norm was logged there",
        ),
        "look at the labels of one batch (glm4ft inspect shows what they should be): the template's answer marker, "
        "the length limit, the roles; and log with logging_nan_inf_filter: false",
    )


def negative_loss(evidence: Evidence) -> Finding | None:
    """The logged loss is below zero."""
    below = [p for p in evidence.curve if p.loss is not None and p.loss < -ROUNDED]
    if not below or not math.isfinite(lowest := min(p.loss or 0.0 for p in below)):
        return None
    return Finding(
        "negative-loss",
        "gradient",
        f"The logged loss is negative from step {below[0].step} on, down to {lowest:.4g}. No cross entropy is below "
        "0: another objective is trained (preferences, a reward), a term is subtracted from it, or its sign is lost.",
        (f"{len(below)} of {len(evidence.losses)} logged losses are below 0",),
        "fine-tune with the cross entropy of the answers alone; of another objective no loss here says whether "
        "anything was learnt",
        0.9,
    )


def memorised(evidence: Evidence) -> Finding | None:
    """The logged loss has come down to 0 step by step; what the weights do was not measured."""
    losses = evidence.losses
    is_asked_for = evidence.target_loss is not None
    if not losses or evidence.is_measured or is_asked_for or not any(losses) or not losses[-1] < MEMORISED:
        return None
    return Finding(
        "memorised",
        "outcome",
        f"The logged loss has fallen to {losses[-1]:.4g}: these rows are known by heart. Whether the model says them, "
        "stops, and answers anything else, the log does not show.",
        (f"{len(losses)} logged losses, the first {losses[0]:.4g}",),
        "judge it on held-out conversations, and have it generate: name base and conversations to glm4ft explain",
        0.6,
    )


def _is_finite(point: CurvePoint) -> bool:
    return all(x is None or math.isfinite(x) for x in (point.loss, point.grad_norm))


def _is_sound(point: CurvePoint) -> bool:
    return point.loss is not None and math.isfinite(point.loss) and point.loss > 0


def _hidden_zeros(curve: Sequence[CurvePoint]) -> int | None:
    """Where the losses drop to exactly 0 for good, from a loss that cannot have got there by learning."""
    losses = [(i, p.loss) for i, p in enumerate(curve) if p.loss is not None]
    if not losses or losses[-1][1] != 0 or not any(loss for _, loss in losses):
        return None
    at = next(n for n in range(len(losses), 0, -1) if losses[n - 1][1] != 0)
    before = losses[at - 1][1]
    is_norm_lost = all(p.grad_norm is None or not math.isfinite(p.grad_norm) for p in curve[losses[at][0] :])
    return losses[at][0] if is_norm_lost and not before < NOT_YET else None
