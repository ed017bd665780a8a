"""A recorded run of a subject: what it was given, what it did, and what the specification says of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm4ft.testing.recording.trace import Forward, Tensors, Trace
from glm4ft.testing.replay.matching import KnownRows
from glm4ft.testing.replay.replay import Verdict, replay
from glm4ft.testing.replay.step import History, ReplayedStep
from glm4ft.testing.specification.reference import LabelledIds, Reference, clip_factor
from glm4ft.testing.trial.stages import NotApplicable

Order = list[list[tuple[int, ...]]]


@dataclass
class RecordedRun:
    """A recorded run.

    Args:
        plan: that the subject was given.
        rows: what it makes of the conversations that it was given.
        trace: of all steps.
        log: as ``train`` returned it; empty if it did not.
        model: as the run left it.
        reference: the specification on the same base.
    """

    plan: Mapping[str, Any]
    rows: list[LabelledIds]
    trace: Trace
    log: list[Mapping[str, Any]]
    model: Any
    reference: Reference

    @functools.cached_property
    def verdict(self) -> Verdict:
        """What a replay of it finds."""
        return replay(self.trace, self.reference, self.rows, self.plan)

    @functools.cached_property
    def known(self) -> KnownRows:
        """Its rows, to be found again."""
        return KnownRows(self.rows)

    @functools.cached_property
    def grad_norms(self) -> list[float]:
        """Global norm of each step's gradient before clipping, without the loss scale that the first step shows."""
        history = History(self.reference, self.known, self.plan, self.trace.dtype)
        scale = ReplayedStep(1, self.trace.steps[0], history).loss_scale if self.trace.steps else 1.0
        return [clip_factor(step.raw, 0)[0] / scale for step in self.trace.steps]

    @functools.cached_property
    def order(self) -> Order:
        """Ids of the rows of each step."""
        return [self.rows_in(step.forwards) for step in self.trace.steps]

    def rows_in(self, forwards: Sequence[Forward]) -> list[tuple[int, ...]]:
        """Ids of the rows in forward passes."""
        return [span.ids for forward in forwards for span in self.known.find_in(forward).rows]

    @property
    def trained(self) -> Tensors:
        """Trained parameters after the last step."""
        return self.trace.steps[-1].after

    def at(self, num_steps: int) -> Tensors:
        """Trained parameters after a number of steps."""
        return self.trace.steps[num_steps - 1].after if num_steps else self.trace.steps[0].before

    def logged(self, name: str) -> dict[int, float]:
        """A figure of the log, by step.

        Raises:
            NotApplicable: if the subject does not log it.
        """
        found = {
            int(e.get("step", i)): float(e[name]) for i, e in enumerate(self.log, start=1) if e.get(name) is not None
        }
        if not found:
            raise NotApplicable(f"the subject's train returns no log with {name}")
        return found
