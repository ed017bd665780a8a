"""A recorded run of a subject: its plan and rows, its trace, and its comparison with the specification."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from glm4ft.testing.recording.trace import Forward, Tensors, Trace
from glm4ft.testing.replay.comparison import count_targets, distance
from glm4ft.testing.replay.history import History
from glm4ft.testing.replay.matching import KnownRows, RowSpan, TokenWeights
from glm4ft.testing.replay.replay import Verdict, replay
from glm4ft.testing.replay.rounding import measured_limits
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.specification.reference import LabelledIds, Reference
from glm4ft.testing.specification.update_rule import clip_factor
from glm4ft.testing.trial.stages import NotApplicable

Order = list[list[tuple[int, ...]]]


@dataclass(frozen=True)
class EvaluatedRow:
    """A known row in a forward pass of an evaluation.

    Args:
        num_steps: The number of steps before the evaluation.
        span: The row's span in the forward pass.
        hidden_TD: The output of the final norm for the row.
        size: The relative departure from the hidden states that the row has alone with the parameters of that step.
    """

    num_steps: int
    span: RowSpan
    hidden_TD: torch.Tensor
    size: float


@dataclass
class RecordedRun:
    """A recorded run of a subject.

    Args:
        plan: The plan that the subject was given.
        rows: The rows that the subject encodes its conversations as.
        trace: The trace of all steps.
        log: The log that ``train`` returned; empty if it returned none.
        model: The model after the run; None if it was released.
        reference: The specification on the same base.
        dropout: The dropout probability that the harness applied to the embeddings.
        weights: The weights of tokens in the loss, as in ``KnownRows``.
    """

    plan: Mapping[str, Any]
    rows: list[LabelledIds]
    trace: Trace
    log: list[Mapping[str, Any]]
    model: Any
    reference: Reference
    dropout: float = 0.0
    weights: TokenWeights = field(default_factory=dict)

    @functools.cached_property
    def verdict(self) -> Verdict:
        """The result of the replay of this run."""
        return replay(
            self.trace, self.reference, self.rows, self.plan, weights=self.weights, limits=self.measured_limits
        )

    @functools.cached_property
    def measured_limits(self) -> dict[str, float]:
        """What counts as rounding in this run, by stage; empty in fp32, where the usual limits hold."""
        return measured_limits(self.reference, self.trace, self.rows)

    def judge_again(self, **settings: Any) -> None:
        """Replay the run once more, with further settings beside its plan."""
        self.plan = {**self.plan, **settings}
        self.__dict__.pop("verdict", None)

    @functools.cached_property
    def known(self) -> KnownRows:
        """The rows of the run, searchable in its forward passes."""
        return KnownRows(self.rows, self.weights)

    @property
    def has_loss_factor(self) -> bool:
        """Whether the loss of the first step was the token mean times a factor that is not known as a loss scale."""
        first = next(iter(self._replayed_steps()), None)
        return first is not None and first.loss_factor.scale == 1.0 and not first.loss_factor.is_one

    def grad_norms(self) -> list[float]:
        """The global gradient norm of each step before clipping, with the loss scale divided out."""
        steps = self._replayed_steps()
        is_scaled = bool(steps) and steps[0].loss_factor.scale != 1.0
        return [clip_factor(step.step.raw, 0)[0] / (step.loss_factor.scale if is_scaled else 1.0) for step in steps]

    def losses(self) -> list[float]:
        """The loss of each step before its update, by the specification."""
        with torch.no_grad():
            return [
                float(step.reference.loss(step.rows(), step.step.before, weights=step.mean_weights(step.rows())))
                for step in self._replayed_steps()
            ]

    def losses_of_micro_batches(self, number: int) -> list[float]:
        """The loss of each micro-batch of a step, counted from 1, as the mean over its own supervised tokens."""
        step = self._replayed_steps()[number - 1]
        rows = [rows for index in range(len(step.step.forwards)) if count_targets(rows := step.rows(index))]
        with torch.no_grad():
            return [float(step.reference.loss(own, step.step.before, weights=step.mean_weights(own))) for own in rows]

    @functools.cached_property
    def evaluated(self) -> list[EvaluatedRow]:
        """The known rows that the run evaluated."""
        found = list[EvaluatedRow]()
        for num_steps, forward in self.trace.evaluated:
            for span in self.known.find_in(forward).rows:
                hidden_TD = forward.hidden_BTD[span.b][span.positions]
                size = self.size_off(span.ids, hidden_TD, self.at(num_steps))
                found.append(EvaluatedRow(num_steps, span, hidden_TD, size))
        return found

    def require_sound_model(self) -> None:
        """Skip what would be off in every row of the run: other checks report the model, and what is not finite.

        Raises:
            NotApplicable: If the model departs in training, or the run trains to parameters that are not finite.
        """
        if "model" in self.verdict.departures or not self.trace.steps:
            raise NotApplicable("not judged: the run departs, whether or not it evaluates")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.trained.values()):
            raise NotApplicable(
                "not judged: the run trains to parameters that are not finite, which other checks report"
            )

    def size_off(self, ids: tuple[int, ...], hidden_TD: torch.Tensor, trained: Tensors) -> float:
        """The relative departure of a row's hidden states from those that it has alone with trained parameters."""
        with torch.no_grad():
            alone_TD = self.reference.hidden(ids, trained)[: len(hidden_TD)]
        return distance(hidden_TD, alone_TD)

    def _replayed_steps(self) -> list[ReplayedStep]:
        history = History(self.reference, self.known, self.plan, self.trace.dtype)
        return [ReplayedStep(number, step, history) for number, step in enumerate(self.trace.steps, start=1)]

    @functools.cached_property
    def order(self) -> Order:
        """The ids of the rows of each step, in order."""
        return [self.rows_in(step.forwards) for step in self.trace.steps]

    def rows_in(self, forwards: Sequence[Forward]) -> list[tuple[int, ...]]:
        """The ids of the known rows in forward passes, in order."""
        return [span.ids for forward in forwards for span in self.known.find_in(forward).rows]

    @property
    def trained(self) -> Tensors:
        """The trained parameters after the last step."""
        return self.trace.steps[-1].after

    def at(self, num_steps: int) -> Tensors:
        """The trained parameters after a number of steps, as the next step finds them."""
        steps = self.trace.steps
        return steps[num_steps].before if num_steps < len(steps) else steps[-1].after

    def logged(self, name: str) -> dict[int, float]:
        """The logged values of a figure, by step.

        Raises:
            NotApplicable: If the subject does not log the figure, or its steps are not those of the log.
        """
        if not all(step.forwards or step.num_detached for step in self.trace.steps):
            raise NotApplicable("not judged: steps without a forward pass, which the checks of the update report")
        # an evaluation before the first step is logged at 0, too; a loss is not, unless steps are counted from 0
        shift = any(entry.get("step") == 0 and entry.get("loss") is not None for entry in self.log)
        found = {
            int(entry["step"]) + shift if "step" in entry else number: float(entry[name])
            for number, entry in enumerate(self.log, start=1)
            if entry.get(name) is not None
        }
        if not found:
            raise NotApplicable(f"the subject's train returns no log with {name}")
        return found
