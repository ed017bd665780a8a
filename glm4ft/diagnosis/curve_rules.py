"""Rules about the course of the loss: a rate too high or too low, a schedule that ended, too few steps."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from glm4ft.diagnosis.curve import LEAST_STEPS, noise, peak_rate, sum_of_rates, trend
from glm4ft.diagnosis.evidence import Evidence
from glm4ft.diagnosis.finding import Finding
from glm4ft.diagnosis.forecast import forecast

# The limit of the overfit test: conversations with a loss below it are memorised.
LEARNT_LOSS = 0.01
# The share of its peak below which the learning rate is taken as zero.
ENDED = 0.02
# The share of the way from the first loss to the floor below which the loss has hardly fallen.
HARDLY_BEGUN = 0.2
NEVER = 10  # times the steps already made: a longer forecast means a learning rate too low, not a run too short
# A rate that destroys a pretrained model rather than training it: ten times the 2e-4 that is usual for LoRA (QLoRA,
# arXiv 2305.14314, table 9), a hundred times what is usual for all weights. The built-in base takes more.
HIGH_RATE = 2e-3
# If no weight has moved by more than this in sum, an adapter is still about where it began: LoRA's B starts at 0, and
# A has entries of 1/sqrt(hidden), 0.016 for GLM-4.
LEAST_MOVEMENT = 1e-3
# The smoothed loss at the end, over its lowest, from which a run climbs; and in noise of the log.
CLIMBED, CLEARLY = 1.25, 4.0
# Spikes of the loss: above this multiple of the level, at least this often.
SPIKE, LEAST_SPIKES = 2.0, 3
# The share by which the loss falls over the second half of a run that is still falling.
STILL_FALLING = 0.05
# The share of its peak above which the rate still trains.
STILL_TRAINING = 0.1


def rate_too_high(evidence: Evidence) -> Finding | None:
    """The loss fluctuates or rises instead of falling."""
    losses = evidence.losses
    if len(losses) < LEAST_STEPS or not evidence.loss > LEARNT_LOSS:
        return None
    told = _fluctuates(losses) if evidence.is_whole else _climbs(losses) or _never_falls(evidence) or _spikes(losses)
    if not told:
        return None
    facts, peak = [told], peak_rate(evidence.curve)
    facts += [f"peak learning rate {peak:.2g}"] if peak else []
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


def _fluctuates(losses: Sequence[float]) -> str:
    """On rows that are all seen in each epoch, the loss should fall steadily."""
    best, tail = min(losses), losses[-max(3, len(losses) // 4) :]
    rises = sum(max(b - a, 0) for a, b in itertools.pairwise(losses))
    is_up = statistics.median(tail) > max(2 * best, best + 0.1) or statistics.median(tail) > 1.2 * losses[0]
    # the share of all movement that is upwards; it is a half for a walk without direction
    turmoil = rises / max(rises + losses[0] - losses[-1] + rises, 1e-30) if losses[-1] < losses[0] else 1.0
    if not is_up or not turmoil > 0.2:
        return ""
    return f"lowest loss {best:.4f}, median of the last {len(tail)} steps {statistics.median(tail):.4f}"


def _climbs(losses: Sequence[float]) -> str:
    """On rows that are always others, only the level says something: it has risen above its lowest, or its first."""
    window = max(3, len(losses) // 10)
    starts = range(0, len(losses) - window + 1, max(1, window // 2))
    levels = [statistics.median(losses[start : start + window]) for start in starts]
    lowest, last, scatter = min(levels), levels[-1], noise(losses)
    first = statistics.median(losses[: min(3, window)])
    if last > CLIMBED * lowest and last > lowest + CLEARLY * scatter / window**0.5 and last > lowest + scatter:
        return f"lowest level {lowest:.4f}, level at the end {last:.4f} (medians of {window} logged losses)"
    if last > 1.2 * first and last > first + CLEARLY * scatter:
        return f"first losses {first:.4f}, level at the end {last:.4f}"
    return ""


def _never_falls(evidence: Evidence) -> str:
    """At a rate that is certainly high, a loss that does not fall has not been learnt at all."""
    losses, peak = evidence.losses, peak_rate(evidence.curve)
    if not peak >= HIGH_RATE or trend(losses).is_falling:
        return ""
    return f"the loss has not fallen: {_level(losses[:5]):.4f} at the start, {_level(losses[-5:]):.4f} at the end"


def _spikes(losses: Sequence[float]) -> str:
    """Single batches are hard; a run that throws its loss up again and again is unstable."""
    level, scatter = statistics.median(losses), noise(losses)
    spikes = [loss for loss in losses[len(losses) // 10 :] if loss > SPIKE * level and loss > level + 8 * scatter]
    late = statistics.median(losses[-max(3, len(losses) // 4) :]) > 0.95 * statistics.median(losses[: len(losses) // 2])
    if len(spikes) < LEAST_SPIKES or not late:
        return ""
    return f"{len(spikes)} spikes of up to {max(spikes):.2f} over a level of {level:.2f}"


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
    """The loss falls steadily, but very slowly, or the sum of all rates cannot have moved a weight."""
    losses = evidence.losses
    if len(losses) < LEAST_STEPS or not evidence.loss > LEARNT_LOSS:
        return None
    moved = sum_of_rates(evidence.curve)
    if not evidence.is_whole:
        fallen = 1 - _level(losses[-5:]) / _level(losses[:5])
        if moved is None or not 0 < moved < LEAST_MOVEMENT or not fallen < HARDLY_BEGUN:
            return None
        how = f"The loss has hardly fallen, from {_level(losses[:5]):.2f} to {_level(losses[-5:]):.2f}"
    else:
        way = _way(evidence)
        if way is None or not way < HARDLY_BEGUN or not losses[-1] < losses[0]:
            return None
        how = f"The loss falls steadily but too slowly: from {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"
    facts = [f"peak learning rate {peak_rate(evidence.curve):.2g}"] if moved else []
    facts += [f"no weight moved further than {moved:.1g}, the sum of all rates"] if moved else []
    return Finding(
        "rate-too-low",
        "schedule",
        f"{how}: the learning rate is too low.",
        tuple(facts),
        "multiply the learning rate by 10; 2e-4 is usual for LoRA on a 9B base, 5e-3 for the built-in one",
        0.8,
    )


def still_falling(evidence: Evidence) -> Finding | None:
    """The loss is still falling, so the only fault is the number of steps."""
    losses = evidence.losses
    if len(losses) < LEAST_STEPS:
        return None
    if not (evidence.is_whole or evidence.target_loss):
        return _cut_short(evidence)
    floor = evidence.floor.floor if evidence.floor else 0.0
    target = evidence.target_loss or floor + LEARNT_LOSS
    found = forecast(losses, target, floor) if evidence.loss > target else None
    if found is None or found.steps > NEVER * len(losses):
        return None
    return Finding(
        "still-falling",
        "outcome",
        f"The loss is still falling: train longer. It needs {found.describe()} to reach {target:.4g}.",
        (f"loss {losses[-1]:.4f} after {len(losses)} steps, floor {floor:.4f}",),
        f"continue with a schedule over about {len(losses) + (found.latest or 2 * found.steps):,} steps in all",
        0.6,
    )


def _cut_short(evidence: Evidence) -> Finding | None:
    # on more rows than a run memorises nobody knows the end, but a curve that still falls has not reached it
    losses, last = evidence.losses, evidence.curve[-1]
    half = losses[len(losses) // 2 :]
    falling = trend(half)
    still_trains = last.lr is None or last.lr > STILL_TRAINING * peak_rate(evidence.curve)
    if not falling.is_falling or not -falling.change > STILL_FALLING * _level(half) or not still_trains:
        return None
    planned = int(evidence.options.get("planned_steps") or 0)
    end = f" The log ends at step {last.step} of {planned}." if planned > last.step else ""
    return Finding(
        "still-falling",
        "outcome",
        f"The loss is still falling, from {_level(half[:5]):.3f} to {_level(half[-5:]):.3f} over the second half: "
        f"train longer.{end}",
        (f"{last.step:,} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}",),
        "continue over more steps, with evaluations on held-out conversations to see where it stops to help",
        0.6,
    )


def not_falling(evidence: Evidence) -> Finding | None:
    """The loss has not fallen at all, and no other rule says why."""
    losses = evidence.losses
    if len(losses) < LEAST_STEPS or not evidence.loss > LEARNT_LOSS or evidence.is_whole:
        return None
    change = trend(losses)
    if change.is_falling or _level(losses[-5:]) < 0.9 * _level(losses[:5]):
        return None
    return Finding(
        "not-falling",
        "outcome",
        f"The loss has not fallen: {_level(losses[:5]):.3f} at the start, {_level(losses[-5:]):.3f} at the end, a "
        f"change of {change.change:+.3f} +- {change.error:.3f} nats over the run.",
        (f"{len(losses)} logged losses, peak learning rate {peak_rate(evidence.curve):.2g}",),
        "give explain the conversations, the labels and the weights (--data, --rows, --model): does the base know "
        "these answers already, is anything trained, and with which labels?",
        0.5,
    )


def _level(losses: Sequence[float]) -> float:
    return statistics.median(losses)


def _way(evidence: Evidence) -> float | None:
    """Return the share of the way from the first loss to the floor that was covered."""
    losses = evidence.losses
    floor = evidence.floor.floor if evidence.floor else 0.0
    if not losses or not losses[0] > floor:
        return None
    return (losses[0] - statistics.median(losses[-3:])) / (losses[0] - floor)
