"""A known row as it was seen in a forward pass, and how far its hidden states are from the specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glm4ft.testing.replay.matching import RowSpan
from glm4ft.testing.specification.recovered_targets import Targets


@dataclass(frozen=True)
class SeenRow:
    """A known row in a forward pass, with its hidden states and targets.

    Args:
        span: The row's span in the forward pass.
        forward: The index of the forward pass in its step.
        hidden_TD: The output of the final norm for the row.
        targets: The row's targets, recovered from the gradient at the final norm.
    """

    span: RowSpan
    forward: int
    hidden_TD: torch.Tensor
    targets: Targets

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids of the row."""
        return self.span.ids


@dataclass(frozen=True)
class SeenHidden:
    """How far the hidden states of a row are from those that the specification computes of the row alone.

    Args:
        row: The row.
        size: The relative departure over all of its tokens.
        num_right: The number of tokens at its beginning whose own hidden states agree.
    """

    row: SeenRow
    size: float
    num_right: int
