"""Compares a recorded run with the reference stage by stage: the first stage that departs is where the fault is.

Each stage is judged from its own recorded input, so a fault shows at its own stage and not at all later ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.replay.judge_data import judge_batches, judge_model, judge_rows
from glm4ft.testing.replay.judge_update import judge_clipping, judge_gradient, judge_schedule, judge_update
from glm4ft.testing.replay.matching import KnownRows
from glm4ft.testing.replay.step import Departure, Departures, History, ReplayedStep
from glm4ft.testing.replay.tolerances import within
from glm4ft.testing.specification.reference import LabelledIds, Reference

JUDGES: Mapping[str, Callable[[ReplayedStep], Departures]] = {
    "rows": judge_rows,
    "batches": judge_batches,
    "model": judge_model,
    "gradient": judge_gradient,
    "clipping": judge_clipping,
    "schedule": judge_schedule,
    "update": judge_update,
}


@dataclass
class Verdict:
    """The result of a replay.

    Args:
        departure: The first departure; None if the run agrees with the specification.
        largest: The largest relative departure by stage, for the stages judged by a number.
        steps: The number of optimizer steps that agree.
        packed: Whether any sequence of a batch held more than one row.
        seen: The ids of the rows of each step, in order.
    """

    departure: Departure | None = None
    largest: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    packed: bool = False
    seen: list[list[tuple[int, ...]]] = field(default_factory=list)


def replay(trace: Trace, reference: Reference, rows: Sequence[LabelledIds], plan: Mapping[str, Any]) -> Verdict:
    """Compare a recorded run with the specification.

    Args:
        trace: The recording of the run's first steps.
        reference: The reference on the base that the run started from.
        rows: The rows that the data should be encoded as; no two have the same ids.
        plan: The plan that the trainer was given.
    Returns:
        The verdict. Within a step the stages are judged in order, and the first departure ends the replay.
    """
    verdict, history = Verdict(), History(reference, KnownRows(rows), plan, trace.dtype)
    if not trace.steps:
        verdict.departure = Departure("update", 1, "no optimizer step changed a trained parameter")
    for number, step in enumerate(trace.steps, start=1):
        replayed = ReplayedStep(number, step, history)
        verdict.seen.append([row.ids for row in replayed.seen])
        verdict.packed = verdict.packed or _is_packed(replayed)
        departure = _judge(replayed, verdict)
        if departure:
            verdict.departure = _hidden_by_zero_b(departure, trace, history) or departure
            return verdict
        verdict.steps = number
        history.previous = step
    return verdict


def _judge(step: ReplayedStep, verdict: Verdict) -> Departure | None:
    for stage, judge in JUDGES.items():
        for departure in judge(step):
            if math.isfinite(departure.size):
                verdict.largest[stage] = max(verdict.largest.get(stage, 0.0), departure.size)
            is_number = not math.isnan(departure.size)
            if not (is_number and within(f"{stage}: replay", departure.size, step.history.limit)):
                return departure
    return None


def _is_packed(step: ReplayedStep) -> bool:
    sequences = [(row.forward, row.span.b) for row in step.seen]
    return len(set(sequences)) < len(sequences)


def _hidden_by_zero_b(departure: Departure, trace: Trace, history: History) -> Departure | None:
    """The model's departure in step 2 that explains a departure of the gradient in step 1; None if there is none.

    While B is zero, an adapter with the wrong scale changes the gradient but not the output; after one step, both.
    """
    if departure.stage != "gradient" or departure.step != 1 or len(trace.steps) < 2:
        return None
    for later in judge_model(ReplayedStep(2, trace.steps[1], history)):
        if not later.size <= history.limit:
            if departure.factor is None:
                return later
            told = f"while B was zero, its gradient was {departure.factor:.4g} times what it should be"
            return replace(later, cause=f"the adapter's scale: {told}")
    return None
