"""The figures of a run's optimizer steps that a baseline keeps, one curve for each seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.recording.trace import Step, Trace
from glm4ft.testing.replay.matching import KnownRows
from glm4ft.testing.specification.reference import Reference
from glm4ft.testing.specification.update_rule import clip_factor


@dataclass(frozen=True)
class StepFigures:
    """The figures of one optimizer step.

    Args:
        step: The number of the step, from 1.
        loss: The mean loss of the supervised tokens that the model saw, in nats, before the update.
        grad_norm: The global L2 norm of the gradient before clipping.
        learning_rate: The rate of the update, of the first parameter group.
        tokens: The number of tokens of the rows, without padding.
        supervised_tokens: The number of those tokens that are targets.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True)
class Curve:
    """The run of one seed.

    Args:
        seed: The seed of adapters and order of the data.
        steps: The figures of all steps, in order.
        step_s: The duration of a step with the recorder attached, in seconds; it is drawn, and never compared.
        peak_memory_bytes: The largest memory of the process, or of the GPU if there is one; never compared.
    """

    seed: int
    steps: tuple[StepFigures, ...]
    step_s: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def is_finite(self) -> bool:
        """Whether all figures of all steps are finite."""
        return all(math.isfinite(figure) for step in self.steps for figure in astuple(step))


def steps_of(trace: Trace, known: KnownRows, base: Reference) -> tuple[StepFigures, ...]:
    """The figures of a recorded run, computed from what passed through the model; its log is not read.

    Args:
        trace: The recording.
        known: The rows of the run, with their labels.
        base: The base, whose head makes logits of the recorded hidden states.
    """
    return tuple(_figures(number, step, known, base) for number, step in enumerate(trace.steps, start=1))


def _figures(number: int, step: Step, known: KnownRows, base: Reference) -> StepFigures:
    tokens, supervised, total = 0, 0, 0.0
    for forward in step.forwards:
        for span in known.find_in(forward).rows:
            labels = torch.tensor(known.labels[span.ids][1:])
            with torch.no_grad():
                logits_TV = base.logits(forward.hidden_BTD[span.b][span.positions][: len(labels)].float(), step.before)
            tokens, supervised = tokens + len(span.ids), supervised + int((labels != IGNORED).sum())
            total += float(F.cross_entropy(logits_TV, labels[: len(logits_TV)], ignore_index=IGNORED, reduction="sum"))
    rate = next((group.settings["lr"] for group in step.groups if group.names), math.nan)
    norm = clip_factor(step.raw, 0)[0]
    return StepFigures(number, total / supervised if supervised else math.nan, norm, float(rate), tokens, supervised)


def first_unequal(before: Sequence[StepFigures], now: Sequence[StepFigures]) -> str:
    """The first step and figure in which two curves differ in any bit, in words; "" if they are equal."""
    for old, new in zip(before, now, strict=False):
        for name in StepFigures.__dataclass_fields__:
            a, b = getattr(old, name), getattr(new, name)
            if a != b:  # NaN too
                return f"first at step {old.step}: {name.replace('_', ' ')} is {b!r}, was {a!r}"
    return "" if len(before) == len(now) else f"{len(now)} steps, were {len(before)}"
