"""What is recorded of a run: forward passes, gradients, optimizer settings and parameters of its first steps.

Shapes: B sequences of a forward pass, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass
class Forward:
    """One forward pass.

    Args:
        input_ids_BT: The token ids that entered the embedding.
        positions_BT: The position ids that entered the decoder; None if the model had to count them itself.
        attention_mask: The mask that entered the decoder; None if there was none.
        hidden_BTD: The output of the final norm.
        gradient_BTD: The gradient of the loss at that output; None before the backward pass, and if there is none.
        training: True if all dropout layers and modules with trained parameters were in training mode, False if none
            was, None if only some were.
        kept: Whether dropout kept each entry of its input, by the name of the dropout layer; only of layers that
            dropped. None if there were too many entries to record.
        process: The process that it ran in, once the traces of several are merged.
    """

    input_ids_BT: torch.Tensor
    positions_BT: torch.Tensor | None
    attention_mask: torch.Tensor | None
    hidden_BTD: torch.Tensor
    gradient_BTD: torch.Tensor | None
    training: bool | None
    kept: dict[str, torch.Tensor] | None = field(default_factory=dict)
    process: int = 0


@dataclass
class ParameterGroup:
    """The optimizer's settings for the parameters of one group.

    Args:
        names: The names of the trained parameters in the group.
        settings: The group's options: learning rate, betas, eps, weight decay.
        size: The number of parameters in the group, trained or not.
    """

    names: tuple[str, ...]
    settings: dict[str, Any]
    size: int = 0


@dataclass
class Step:
    """One optimizer step.

    Args:
        forwards: The forward passes whose gradients the step applied, in order.
        raw: The gradient of each trained parameter after the last backward pass, before clipping.
        clipped: The gradient of each trained parameter as the optimizer received it.
        before: The trained parameters before the update.
        groups: The optimizer's parameter groups, with learning rate, betas, eps and weight decay.
        optimizer: The name of the optimizer's class.
        after: The trained parameters after the update.
        state_dtypes: The dtype of the optimizer's moments, by parameter.
        num_detached: The number of forward passes in training mode whose hidden states required no gradient.
        norms: The exact norms of the gradients ``raw`` and ``clipped`` of each parameter of which a sample is recorded.
        whole: The trained parameters before the update, where those of a sample are known from elsewhere.
    """

    forwards: list[Forward]
    raw: Tensors
    clipped: Tensors
    before: Tensors
    groups: list[ParameterGroup]
    optimizer: str
    after: Tensors = field(default_factory=dict)
    state_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    num_detached: int = 0
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    whole: Tensors | None = None

    @property
    def weights(self) -> Tensors:
        """The trained parameters before the update, each with all of its entries."""
        return self.before if self.whole is None else self.whole


@dataclass
class Trace:
    """The first optimizer steps of a run.

    Args:
        steps: The completed steps, in order.
        dtype: The dtype of the forward pass: that of the head, or of autocast where it is on.
        trained: The names of the parameters that require a gradient when the recording begins.
        optimized: The names of the trained parameters that the optimizer holds.
        dropout: The probability of each dropout layer that drops, by its name.
        foreign_steps: The number of steps of optimizers that hold no trained parameter of the model.
        autocast: The dtype that training's forward passes ran in under autocast, by torch's name; None without it.
        sharded: The dimension along which a parameter is split over the processes, by its name; each trace then holds
            its process's part.
        sampled: The shapes of the parameters of which a sample is recorded, see ``sampling``, by their names.
        evaluations: The forward passes without gradient, each with the number of steps taken before it.
    """

    steps: list[Step] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    trained: tuple[str, ...] = ()
    optimized: tuple[str, ...] = ()
    evaluations: list[tuple[int, Forward]] = field(default_factory=list)
    dropout: dict[str, float] = field(default_factory=dict)
    foreign_steps: int = 0
    autocast: str | None = None
    sharded: dict[str, int] = field(default_factory=dict)
    sampled: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def evaluated(self) -> list[tuple[int, Forward]]:
        """The forward passes that evaluate: those without gradient, but for a step's further passes over its own batch.

        Every step may look at its batch again, in training mode or without adapters, as distillation and metrics do;
        where only some do, an evaluation happens to have the batch that a step has.
        """
        with_further = {n for n, forward in self.evaluations if self._is_further(n, forward)}
        if with_further != set(range(len(self.steps))):
            return self.evaluations
        return [(n, forward) for n, forward in self.evaluations if not self._is_further(n, forward)]

    def _is_further(self, num_steps: int, forward: Forward) -> bool:
        """Whether a pass is over a batch of the step that follows a number of steps; none is after the last."""
        following = self.steps[num_steps].forwards if num_steps < len(self.steps) else []
        return any(torch.equal(forward.input_ids_BT, own.input_ids_BT) for own in following)

    @property
    def num_bytes(self) -> int:
        """The size of all tensors of the steps, in bytes."""
        return sum(tensor.nbytes for step in self.steps for tensor in _tensors(step))


def _tensors(step: Step) -> Iterator[torch.Tensor]:
    for named in (step.raw, step.clipped, step.before, step.after):
        yield from named.values()
    for forward in step.forwards:
        yield from (value for value in vars(forward).values() if isinstance(value, torch.Tensor))
        yield from (forward.kept or {}).values()
