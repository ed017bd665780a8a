"""The specification that the steps of a run are judged by, and what the earlier ones left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from glm4ft.testing.recording.trace import Step
from glm4ft.testing.replay.matching import KnownRows
from glm4ft.testing.specification.reference import Reference
from glm4ft.testing.specification.update_rule import AdamW


@dataclass
class History:
    """The specification that a step is judged by, and what the earlier steps left.

    Args:
        reference: The reference on the base that the run started from.
        known: The rows that the data should be encoded as.
        plan: The plan that the trainer was given.
        dtype: The dtype of the forward passes, by which limits are looked up.
        clipped_to: The norm of the gradient after clipping, for each step so far that was clipped.
        loss_name: The loss that the run has in place of cross entropy, "" if it is unknown; None before one was seen.
        applied: The learning rate of each parameter group, for each recorded step.
        seen: The number of times that each row has been seen, by its ids.
        seen_by: The processes that have seen each row, by its ids.
        previous: The previous step; None before the first.
        dropout: The probability of each dropout layer, by its name; those whose choices were recorded are replayed.
        limits: The limit of each stage for which it was measured on the run itself.
        sampled: The shapes of the parameters of which a sample is recorded.
    """

    reference: Reference
    known: KnownRows
    plan: Mapping[str, Any]
    dtype: torch.dtype
    seen: Counter[tuple[int, ...]] = field(default_factory=Counter)
    seen_by: dict[tuple[int, ...], set[int]] = field(default_factory=dict)
    previous: Step | None = None
    loss_name: str | None = None
    clipped_to: list[float] = field(default_factory=list)
    applied: Sequence[Sequence[float]] = ()
    dropout: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    sampled: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rounded_to = self.dtype
        if self.dtype == torch.float16:
            self.dtype = torch.bfloat16  # whose limits are the wider ones
        plan = self.plan
        self.optimizer = AdamW(plan["betas"], plan["eps"], plan["weight_decay"], plan.get("weight_decays"))

    def rates(self, group: int) -> list[float]:
        """The learning rate of a parameter group for each recorded step; NaN where there is no such group."""
        return [rates[group] if group < len(rates) else math.nan for rates in self.applied]

    @property
    def factors(self) -> Mapping[str, float]:
        """The factors of the learning rate that were asked for, by a part of the names of their parameters."""
        found: Mapping[str, float] = self.plan.get("learning_rate_factors") or {}
        return found

    def rate_factor(self, name: str) -> float:
        """The factor of the learning rate of a parameter."""
        return next((float(factor) for part, factor in self.factors.items() if part in name), 1.0)
