"""Compares a recorded run with the reference stage by stage: the first stage that departs is where the fault is.

Each stage is judged from its own recorded input, so a fault shows at its own stage and not at all later ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.replay.departure import Departure, Departures
from glm4ft.testing.replay.history import History
from glm4ft.testing.replay.judge_clipping import judge_clipping
from glm4ft.testing.replay.judge_data import judge_batches, judge_model, judge_rows
from glm4ft.testing.replay.judge_gradient import judge_gradient, judge_loss
from glm4ft.testing.replay.judge_schedule import judge_schedule
from glm4ft.testing.replay.judge_update import judge_update
from glm4ft.testing.replay.matching import KnownRows, TokenWeights
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.replay.tolerances import LIMITS, within
from glm4ft.testing.specification.reference import LabelledIds, Reference

# In order. A judge reports departures of its stage; the loss is judged from the recorded hidden states alone, so that a
# wrong model does not hide a wrong loss.
JUDGES: Mapping[str, Callable[[ReplayedStep], Departures]] = {
    "rows": judge_rows,
    "batches": judge_batches,
    "model": judge_model,
    "loss": judge_loss,
    "gradient": judge_gradient,
    "clipping": judge_clipping,
    "schedule": judge_schedule,
    "update": judge_update,
}


NEED_WEIGHTS = ("rows", "batches", "model", "loss", "gradient")  # judges that compute with all trained parameters


@dataclass
class Verdict:
    """The result of a replay.

    Args:
        departures: The first departure of each stage that departs, by stage, in the order of step and stage.
        more: Further departures of those stages, of other causes than the first.
        hidden: Stages that no step judged completely, mapped to the stage of the departure that hides them.
        largest: The largest relative size of a comparison by stage, for the stages judged by a number.
        limits: The largest relative size that passes in the step of the largest one, by stage, for the same stages.
        steps: The number of optimizer steps before the first departure.
        packed: Whether any sequence of a batch held more than one row.
        removes_factor: Whether a factor on the loss was taken out of the gradient before the optimizer received it.
        is_undecided: Whether the gradient agrees if a sum over tokens is divided before it is clipped, and no step
            shows that it is.
        has_unstated_weights: Whether the tokens of a row differ in their weight, in a run that does not state why.
        seen: The ids of the rows of each step, in order.
    """

    departures: dict[str, Departure] = field(default_factory=dict)
    more: dict[str, list[Departure]] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    packed: bool = False
    removes_factor: bool = False
    is_undecided: bool = False
    has_unstated_weights: bool = False
    seen: list[list[tuple[int, ...]]] = field(default_factory=list)

    @property
    def departure(self) -> Departure | None:
        """The first departure; None if the run agrees with the specification."""
        return next(iter(self.departures.values()), None)

    def at(self, stage: str) -> list[Departure]:
        """The departures of a stage, one of each cause."""
        return [self.departures[stage], *self.more.get(stage, [])] if stage in self.departures else []

    def add(self, departure: Departure) -> None:
        """Keep a departure that is the first of its stage, or of another cause than those before it."""
        if departure.stage not in self.departures:
            self.departures[departure.stage] = departure
        elif all(departure.kind != other.kind for other in self.at(departure.stage)):
            self.more.setdefault(departure.stage, []).append(departure)


def replay(
    trace: Trace,
    reference: Reference,
    rows: Sequence[LabelledIds],
    plan: Mapping[str, Any],
    skip: Collection[str] = (),
    limits: Mapping[str, float] | None = None,
    weights: TokenWeights | None = None,
) -> Verdict:
    """Compare a recorded run with the specification.

    Each stage of each step is judged from its own recorded input, so a departure does not end the replay: what follows
    is judged as well, except for comparisons that the departure makes meaningless. A step that is not finite ends it.

    Args:
        trace: The recording of the run's first steps.
        reference: The reference on the base that the run started from.
        rows: The rows that the data should be encoded as; no two have the same ids.
        plan: The plan that the trainer was given.
        skip: The judges that have nothing to compare with.
        limits: The largest relative departure that counts as rounding, for stages where the usual one is not right.
        weights: The weights of tokens in the loss, as in ``KnownRows``.
    Returns:
        The verdict.
    """
    verdict = Verdict()
    history = History(reference, KnownRows(rows, weights), plan, trace.dtype, dropout=trace.dropout,
                      limits=limits or {}, sampled=trace.sampled)  # fmt: skip
    history.applied = [[float(group.settings["lr"]) for group in step.groups] for step in trace.steps]
    judged, hidden_from_now_on = set[str](), dict.fromkeys(skip, "")
    if not trace.steps:
        verdict.departures["update"] = Departure("update", 1, "no optimizer step changed a trained parameter")
        verdict.hidden = {stage: "update" for stage in map(_stage_of, JUDGES) if stage != "update"}
    for number, step in enumerate(trace.steps, start=1):
        replayed = ReplayedStep(number, step, history)
        if not replayed.has_weights:
            hidden_from_now_on |= dict.fromkeys(NEED_WEIGHTS, "")
        verdict.seen.append([row.ids for row in replayed.seen])
        verdict.packed = verdict.packed or _is_packed(replayed)
        judged |= _judge(replayed, verdict, hidden_from_now_on)
        verdict.removes_factor = verdict.removes_factor or replayed.loss_factor.is_removed
        verdict.is_undecided = verdict.is_undecided or replayed.loss_factor.is_undecided
        verdict.has_unstated_weights = verdict.has_unstated_weights or replayed.has_unstated_weights
        if not verdict.departures:
            verdict.steps = number
        if replayed.not_finite:
            break
        history.previous = step
    verdict.hidden = {stage: by for stage, by in verdict.hidden.items() if stage not in judged}
    verdict.is_undecided = verdict.is_undecided and not (verdict.removes_factor or "gradient" in verdict.departures)
    _explain_by_scale(verdict, _first_moved(trace))
    return verdict


def _stage_of(judge: str) -> str:
    return "gradient" if judge == "loss" else judge


def _judge(step: ReplayedStep, verdict: Verdict, hidden_from_now_on: dict[str, str]) -> set[str]:
    """Judge a step and add each stage's first departure to the verdict.

    Args:
        step: The step.
        verdict: The verdict so far.
        hidden_from_now_on: Judges mapped to the stage of a departure of an earlier step that hides them.

    Returns:
        The stages that were judged completely.
    """
    hidden, incomplete = dict(hidden_from_now_on), set[str]()
    for name, judge in JUDGES.items():
        stage = _stage_of(name)
        if name in hidden:
            incomplete.add(stage)
            verdict.hidden.setdefault(stage, hidden[name])
            continue
        for departure in judge(step):
            size = departure.size
            if size is not None and math.isfinite(size) and size >= verdict.largest.get(stage, 0.0):
                verdict.largest[stage], verdict.limits[stage] = size, step.limit(stage)
            is_measured = stage in step.history.limits
            if size is None or not within(f"{stage}: replay", size, step.limit(stage), is_measured=is_measured):
                verdict.add(departure)
                hidden |= dict.fromkeys(departure.hides, departure.stage)
                hidden_from_now_on |= dict.fromkeys(departure.hides_later, departure.stage)
                if departure.hides:
                    break  # what the judge compares next would follow from this
    return {_stage_of(name) for name in JUDGES} - incomplete


def _is_packed(step: ReplayedStep) -> bool:
    sequences = [(row.forward, row.span.b) for row in step.seen]
    return len(set(sequences)) < len(sequences)


def _first_moved(trace: Trace) -> int:
    """The first step before which a matrix B is not zero; 0 if there is none."""
    moved = (i for i, step in enumerate(trace.steps, 1) for n, t in step.before.items() if "lora_B" in n and t.any())
    return next(moved, 0)


def _explain_by_scale(verdict: Verdict, first_moved: int) -> None:
    """Keep the model's departure alone where it explains the gradient's before it.

    While B is zero, an adapter with the wrong scale changes the gradient but not the output; once B has moved, both. A
    warm-up whose first rate is zero leaves B where it is.
    """
    gradient, model = verdict.departures.get("gradient"), verdict.departures.get("model")
    if gradient is None or model is None or model.size is None or gradient.step != 1:
        return
    if model.step == 1 or model.step < first_moved or model.cause:
        return
    # in low precision the output departs only once B is large enough for its scale to exceed the rounding
    is_exact = verdict.limits.get("model", 0.0) <= LIMITS[torch.float32]
    if model.step > first_moved and (is_exact or gradient.factor is None):
        return
    if gradient.hides:  # the loss itself departs, which is judged at the recorded hidden states
        return
    del verdict.departures["gradient"]
    verdict.hidden["gradient"] = "model"
    if gradient.factor is not None:
        told = f"while B was zero, its gradient was {gradient.factor:.4g} times what it should be"
        verdict.departures["model"] = replace(model, cause=f"the adapter's scale: {told}")
