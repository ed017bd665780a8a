"""One recorded step beside the specification: what every judge of it needs, computed once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from glm4ft.data.chat_format import IGNORED
from glm4ft.testing.recording.trace import Step, Tensors
from glm4ft.testing.replay.matching import KnownRows, RowMatches, RowSpan
from glm4ft.testing.specification.reference import AdamW, LabelledIds, Reference, Targets, recover_targets

# Largest relative departure that is rounding, by the dtype of the base. In fp32 240 clean runs of 10 steps (20 seeds,
# padded and packed, 1, 2 and 4 micro-batches, clipping on and off; x86-64 CPU, 2026-11-25) stayed below 8.3e-7 for
# batches, 8.4e-7 for the model, 2.2e-6 for the gradient, 1.9e-7 for clipping, and below rounding for the update; see
# tests/sweeps/clean_departures.py.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# A token's weight is read off a gradient that shrinks as the model grows sure of it, so it is known less well.
WEIGHT_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
# Loss scaling, as fp16 training needs it, multiplies by a power of two that is at least this large.
MIN_LOSS_SCALE = 2.0**8


@dataclass(frozen=True)
class Departure:
    """Where a run left the specification.

    Args:
        stage: slug of the stage.
        step: optimizer step, from 1.
        text: what was found and what was expected.
        cause: the likely one, if the numbers give it away.
        size: The relative size of the departure; NaN where a number says nothing.
        factor: What the whole gradient was multiplied by, if that explains the departure; None otherwise.
    """

    stage: str
    step: int
    text: str
    cause: str = ""
    size: float = math.nan
    factor: float | None = None

    def __str__(self) -> str:
        cause = f"; likely cause: {self.cause}" if self.cause else ""
        return f"{self.stage}, step {self.step}: {self.text}{cause}"


Departures = Iterator[Departure]


@dataclass
class History:
    """What a step is judged by: the specification, and what went before.

    Args:
        reference: on the base that the run started from.
        known: rows that the data should have become.
        plan: that the trainer was asked to follow.
        dtype: of the base.
        seen: how often each row has been seen.
        previous: the step before.
    """

    reference: Reference
    known: KnownRows
    plan: Mapping[str, Any]
    dtype: torch.dtype
    seen: Counter[tuple[int, ...]] = field(default_factory=Counter)
    previous: Step | None = None

    def __post_init__(self) -> None:
        self.optimizer = AdamW(self.plan["betas"], self.plan["eps"], self.plan["weight_decay"])

    @property
    def limit(self) -> float:
        """Largest relative departure that is rounding."""
        return LIMITS[self.dtype]


@dataclass(frozen=True)
class SeenRow:
    """A row as it went through the model.

    Args:
        place: where.
        forward: index of the forward pass in its step.
        hidden_TD: output of the final norm.
        targets: what the gradient there says.
    """

    span: RowSpan
    forward: int
    hidden_TD: torch.Tensor
    targets: Targets

    @property
    def ids(self) -> tuple[int, ...]:
        """Of the row."""
        return self.span.ids


class ReplayedStep:
    """A recorded step and what the specification says about it.

    Args:
        number: from 1.
        step: as recorded.
        history: what it is judged by.
    """

    def __init__(self, number: int, step: Step, history: History) -> None:
        self.number, self.step, self.history, self.reference = number, step, history, history.reference

    def depart(
        self, stage: str, text: str, cause: str = "", size: float = math.nan, factor: float | None = None
    ) -> Departure:
        """A departure of this step."""
        return Departure(stage, self.number, text, cause, size, factor)

    @cached_property
    def row_matches(self) -> list[RowMatches]:
        """Of each forward pass."""
        return [self.history.known.find_in(forward) for forward in self.step.forwards]

    @cached_property
    def targets(self) -> list[list[Targets]]:
        """Of each forward pass and each row of its batch."""
        weight_VD = self.reference.head_weight(self.step.before)
        found = []
        for forward in self.step.forwards:
            assert forward.gradient_BTD is not None
            pairs = zip(forward.hidden_BTD, forward.gradient_BTD, strict=True)
            found.append([recover_targets(hidden_TD, gradient_TD, weight_VD) for hidden_TD, gradient_TD in pairs])
        return found

    @cached_property
    def seen(self) -> list[SeenRow]:
        """The known rows in it, in order."""
        return [
            SeenRow(p, i, forward.hidden_BTD[p.b][p.positions], self.targets[i][p.b].at(p.positions))
            for i, (forward, matches) in enumerate(zip(self.step.forwards, self.row_matches, strict=True))
            for p in matches.rows
        ]

    @cached_property
    def is_finite(self) -> bool:
        """Whether the loss's gradient is a number everywhere."""
        gradients = [forward.gradient_BTD for forward in self.step.forwards]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)

    def labels_of(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """As encoded, but for the first token, which nothing predicts."""
        return (IGNORED, *self.history.known.labels[ids][1:])

    def rows(self, forward: int | None = None) -> list[LabelledIds]:
        """The rows of the step, or of one of its forward passes."""
        return [(row.ids, self.labels_of(row.ids)) for row in self.seen if forward in (None, row.forward)]

    @cached_property
    def num_targets(self) -> int:
        """Supervised tokens of the whole step."""
        return count_targets(self.rows())

    @cached_property
    def hidden_sizes(self) -> list[tuple[SeenRow, float]]:
        """Each row's relative departure from what it computes alone."""
        return [(row, self.hidden_size(row.ids, row.hidden_TD, self.step.before)) for row in self.seen]

    def hidden_size(self, ids: Sequence[int], hidden_TD: torch.Tensor, trained: Tensors) -> float:
        """Relative departure of a row's hidden states from the specification."""
        with torch.no_grad():
            alone = self.reference.hidden(ids, trained)
        return float((hidden_TD - alone).norm() / alone.norm())

    @cached_property
    def loss_scale(self) -> float:
        """What the loss was multiplied by for the backward pass and will be taken out again; 1 unless fp16 asks."""
        weights = [float(w) for row in self.seen for w in row.targets.weights_T if w > 0]
        ratio = sorted(weights)[len(weights) // 2] * self.num_targets if weights else 1.0
        if not 0 < ratio < math.inf:
            return 1.0
        nearest = 2.0 ** round(math.log2(ratio))
        is_scale = nearest >= MIN_LOSS_SCALE and abs(ratio / nearest - 1) <= WEIGHT_LIMITS[self.history.dtype]
        return nearest if is_scale else 1.0

    @cached_property
    def raw(self) -> Tensors:
        """The accumulated gradient, a loss scale taken out."""
        return {name: tensor / self.loss_scale for name, tensor in self.step.raw.items()}


def count_targets(rows: Sequence[LabelledIds]) -> int:
    """Supervised tokens; a first token is none."""
    return sum(label != IGNORED for _, labels in rows for label in labels[1:])


def relative(got: Tensors, expected: Tensors) -> float:
    """Norm of the difference over the norm of what was expected, over all tensors; inf if one is missing."""
    if got.keys() != expected.keys():
        return math.inf
    off = sum(float((got[name].double() - expected[name].double()).pow(2).sum()) for name in expected)
    size = sum(float(tensor.double().pow(2).sum()) for tensor in expected.values())
    return math.sqrt(off / size) if size else math.sqrt(off)


def dot(a: Tensors, b: Tensors) -> float:
    """Sum of the products of all entries."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a if name in b)
