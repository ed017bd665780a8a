"""Rules about the training curve: non-finite numbers, a wrong start, learning rate, schedule, too few steps."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from glm4ft.diagnosis.evidence import CurvePoint, Evidence
from glm4ft.diagnosis.finding import Finding
from glm4ft.diagnosis.forecast import forecast

# The limit of the overfit test: conversations with a loss below it are memorised.
LEARNT_LOSS = 0.01
# The fewest steps from which a curve is judged.
LEAST_STEPS = 8
# Largest relative difference between the first logged loss, of one batch, and the base's over all rows: on the two
# conversations of the demo, a batch of one differs by 6 % at most (4 seeds of the built-in base, x86-64 CPU,
# 2026-11-25).
START_DIFFERENCE = 0.3
# The same if the first step saw all rows: fresh adapters have no effect, so the two losses are equal. Between fp32 and
# bf16 the loss of the demo differs by 0.04 % at most (3 seeds of the built-in base, x86-64 CPU, 2026-11-25).
WHOLE_START_DIFFERENCE = 0.02
# The share of its peak below which the learning rate is taken as zero.
ENDED = 0.02
# The share of the way from the first loss to the floor below which the loss has hardly fallen.
HARDLY_BEGUN = 0.2
# The saved model differs from the logged one if the log's last loss is less than a quarter of the measured one. On
# clean runs the two differ by one step's progress, a factor of 1.04 at a loss of 0.002 on the built-in base; the median
# of the last logged losses evens out the batches.
LOGGED_SHARE, DIFFERENT_LOSS = 0.25, 0.02
LAST_SHARE = 12  # the last logged losses are the last twelfth
NEVER = 10  # times the steps already made: a longer forecast means a learning rate too low, not a run too short


def numerics(evidence: Evidence) -> Finding | None:
    """A number is not finite."""
    bad = evidence.gradients.non_finite_steps if evidence.gradients else ()
    broken = evidence.adapters.non_finite if evidence.adapters else ()
    is_lost = any(math.isnan(row.loss) for row in evidence.rows if any(t.supervised for t in row.tokens))
    is_lost = is_lost and evidence.adapters is not None
    if not (bad or broken or is_lost):
        return None
    facts = [f"first step that is not finite: {bad[0]}"] if bad else []
    facts += [f"{len(broken)} adapters hold NaN or infinity, the first {broken[0]}"] if broken else []
    facts += ["the trained model's loss is NaN"] if is_lost else []
    when = (
        "from the first step on: weights were never initialised" if bad and bad[0] <= 1 else "in the course of the run"
    )
    return Finding(
        "numerics",
        "model",
        f"The numbers are not finite, {when if bad else 'in the adapters'}; nothing can be learnt from there on.",
        tuple(facts),
        "train in bf16 or fp32 with adapters in fp32, never fp16; check the initialisation, and lower the learning "
        "rate if the first steps were finite",
    )


def wrong_start(evidence: Evidence) -> Finding | None:
    """The first loss differs from that of the base, so the trained model is not the base."""
    first = evidence.first_loss
    is_known = first.logged is not None and first.base is not None and math.isfinite(first.logged)
    # a log that begins at a later step holds a mean over steps, or the loss of a resumed run
    if not is_known or evidence.curve[0].step != 1 or first.logged is None or first.base is None:
        return None
    # the base's loss is known for the measured rows only, and the first step of a large data set saw others
    is_whole = evidence.is_whole and int(evidence.options.get("rows_per_step") or 0) >= len(evidence.rows)
    limit = WHOLE_START_DIFFERENCE if is_whole else START_DIFFERENCE
    if not abs(first.logged / first.base - 1) > limit:
        return None
    far = first.logged > 1.5 * first.uniform
    if not (evidence.is_whole or far):
        return None
    return Finding(
        "wrong-start",
        "model",
        f"Training began at a loss of {first.logged:.4g}, but the base itself has {first.base:.4g} on these rows: the "
        "trained model is not the base, or the trained tokens are not these.",
        (
            f"the first step saw {'all' if is_whole else 'some of the'} rows",
            f"ln V, the loss of a model that knows nothing, is {first.uniform:.2f}",
        ),
        "compare logits of the wrapped model before training with those of plain transformers on the same rows",
        0.9 if is_whole or far else 0.6,
    )


def reload_differs(evidence: Evidence) -> Finding | None:
    """The saved adapter on its base has a much larger loss than the run logged."""
    losses = _losses(evidence.curve)
    measured = [token.loss for token in evidence.supervised if not math.isnan(token.loss)]
    if evidence.adapters is None or not losses or not measured:
        return None
    now, logged = statistics.fmean(measured), statistics.median(losses[-max(1, len(losses) // LAST_SHARE) :])
    if not now > DIFFERENT_LOSS or not logged < LOGGED_SHARE * now:
        return None
    facts = (f"last logged loss {logged:.4f}, measured loss of the supervised tokens {now:.4f}", _start(evidence))
    if _is_only_padded(evidence):
        return Finding(
            "rows-depend-on-their-batch",
            "batches",
            "The longest row was learnt, but the shorter ones were not, although the log shows a low loss: in a batch, "
            "padding or neighbours change what the model sees of a row.",
            facts,
            "mask padding by length, restart positions at each row, and compare each row's loss alone and in its batch",
            0.9,
        )
    return Finding(
        "reload-differs",
        "model",
        "The log and the saved adapter on its base disagree: what was trained is not what was saved, or was trained on "
        "a base that computes something else.",
        facts,
        "compare logits of the model in training with those of base and adapter in plain transformers and peft: the "
        "base's configuration (rotary embedding, norms), the adapter's scale (alpha / rank), the names of its tensors",
        0.9,
    )


def _is_only_padded(evidence: Evidence) -> bool:
    longest = max(row.length for row in evidence.rows)
    shorter = [row.loss for row in evidence.rows if row.length < longest and not math.isnan(row.loss)]
    full = [row.loss for row in evidence.rows if row.length == longest]
    return bool(shorter) and max(full) < DIFFERENT_LOSS < statistics.median(shorter)


def rate_too_high(evidence: Evidence) -> Finding | None:
    """The loss fluctuates or rises instead of falling."""
    losses = _losses(evidence.curve)
    if len(losses) < LEAST_STEPS or not evidence.loss > LEARNT_LOSS:
        return None
    best, tail = min(losses), losses[-max(3, len(losses) // 4) :]
    rises = sum(max(b - a, 0) for a, b in itertools.pairwise(losses))
    is_climbing = statistics.median(tail) > 1.2 * statistics.median(losses[: len(tail)])
    if not (evidence.is_whole or is_climbing):
        return None
    is_up = statistics.median(tail) > max(2 * best, best + 0.1) or statistics.median(tail) > 1.2 * losses[0]
    # the share of all movement that is upwards; it is a half for a walk without direction
    turmoil = rises / max(rises + losses[0] - losses[-1] + rises, 1e-30) if losses[-1] < losses[0] else 1.0
    if not is_up or not turmoil > 0.2:
        return None
    rates = [point.lr for point in evidence.curve if point.lr]
    facts = [f"lowest loss {best:.4f}, median of the last {len(tail)} steps {statistics.median(tail):.4f}"]
    facts += [f"peak learning rate {max(rates):.2g}"] if rates else []
    if evidence.gradients and evidence.gradients.spike_ratio > 3:
        g = evidence.gradients
        facts.append(f"gradient norm jumps to {g.spike_ratio:.0f} times its neighbourhood at step {g.spike_step}")
    return Finding(
        "rate-too-high",
        "update",
        "The loss fluctuates or rises instead of falling: the learning rate is too high for these adapters.",
        tuple(facts),
        "divide the learning rate by 3 to 10, warm up over some steps, and keep clipping at 1",
        0.9,
    )


def schedule_ended_early(evidence: Evidence) -> Finding | None:
    """The learning rate was almost zero before the data were learnt."""
    points = [p for p in evidence.curve if p.loss is not None and p.lr is not None]
    if len(points) < LEAST_STEPS or not evidence.loss > LEARNT_LOSS:
        return None
    peak = max(p.lr or 0.0 for p in points)
    ended = [p for p in points if not (p.lr or 0.0) > ENDED * peak and p.step > points[0].step + len(points) // 4]
    if not peak > 0 or len(ended) < max(3, 0.15 * len(points)):
        return None
    return Finding(
        "schedule-ended-early",
        "schedule",
        f"The learning rate was almost zero by step {ended[0].step} of {points[-1].step}, while the loss was still "
        f"{ended[0].loss:.4f}: the remaining steps changed nothing.",
        (f"learning rate: peak {peak:.2g}, last {points[-1].lr:.2g}", f"loss now {evidence.loss:.4f}"),
        "give the schedule the actual number of optimizer steps, or use schedule: constant",
        0.9,
    )


def rate_too_low(evidence: Evidence) -> Finding | None:
    """The loss falls steadily, but very slowly."""
    losses, fallen = _losses(evidence.curve), _way(evidence)
    if (
        not evidence.is_whole
        or len(losses) < LEAST_STEPS
        or fallen is None
        or not fallen < HARDLY_BEGUN
        or not losses[-1] < losses[0]
    ):
        return None
    rates = [point.lr for point in evidence.curve if point.lr]
    return Finding(
        "rate-too-low",
        "schedule",
        f"The loss falls steadily but too slowly: from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps.",
        (f"that is {fallen:.1%} of the way to the floor", *([f"peak learning rate {max(rates):.2g}"] if rates else [])),
        "multiply the learning rate by 10; 2e-4 is usual for LoRA on a 9B base, 5e-3 for the built-in one",
        0.8,
    )


def still_falling(evidence: Evidence) -> Finding | None:
    """The loss is still falling, so the only fault is the number of steps."""
    losses = _losses(evidence.curve)
    floor = evidence.floor.floor if evidence.floor else 0.0
    target = evidence.target_loss or floor + LEARNT_LOSS
    if not (evidence.is_whole or evidence.target_loss) or len(losses) < LEAST_STEPS or not evidence.loss > target:
        return None
    found = forecast(losses, target, floor)
    if found is None or found.steps > NEVER * len(losses):
        return None
    return Finding(
        "still-falling",
        "outcome",
        f"The loss is still falling. It needs {found.describe()} to reach {target:.4g}.",
        (f"loss {losses[-1]:.4f} after {len(losses)} steps, floor {floor:.4f}",),
        f"continue with a schedule over about {len(losses) + (found.latest or 2 * found.steps):,} steps in all",
        0.6,
    )


def _start(evidence: Evidence) -> str:
    first = evidence.first_loss
    base = math.nan if first.base is None else first.base
    logged = math.nan if first.logged is None else first.logged
    return f"the run began at {logged:.4f}, the base itself has {base:.4f}"


def _losses(curve: Sequence[CurvePoint]) -> list[float]:
    return [p.loss for p in curve if p.loss is not None and math.isfinite(p.loss)]


def _way(evidence: Evidence) -> float | None:
    """Return the share of the way from the first loss to the floor that was covered."""
    losses = _losses(evidence.curve)
    floor = evidence.floor.floor if evidence.floor else 0.0
    if not losses or not losses[0] > floor:
        return None
    return (losses[0] - statistics.median(losses[-3:])) / (losses[0] - floor)
