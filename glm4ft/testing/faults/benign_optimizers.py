"""Legitimate ways to hold and call the optimizer that look unlike the plain loop's: no check may fail on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from glm4ft.testing.faults.master_copies import FlatMasterCopy
from glm4ft.testing.faults.variations import variation
from glm4ft.testing.subjects.plain_loop import LoopState, Subject
from glm4ft.testing.subjects.plain_loop_data import Batch


class _Together:
    """Two optimizers behind the interface of one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Any:
        """The state of the optimizer that holds a parameter, by parameter."""
        return _States([optimizer.state for optimizer in self.optimizers])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of both."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        """Take the step of each."""
        for optimizer in self.optimizers:
            optimizer.step()


class _States:
    def __init__(self, states: Sequence[Any]) -> None:
        self.states = states

    def __getitem__(self, parameter: torch.Tensor) -> Any:
        return next((state for state in self.states if parameter in state), self.states[0])[parameter]


@variation("two-optimizers")
class TwoOptimizers(Subject):
    """The matrices A and the matrices B have an optimizer each, which step one after the other."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> Any:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        options = {"lr": plan["learning_rate"], "betas": tuple(plan["betas"]), "eps": plan["eps"]}
        return _Together(
            [
                torch.optim.AdamW([p for n, p in named if part in n], weight_decay=plan["weight_decay"], **options)
                for part in (".lora_A.", ".lora_B.")
            ]
        )

    def load_optimizer(self, run: LoopState, folder: Any) -> None:
        """Load the moments into the optimizer that holds each parameter."""
        together: Any = run.optimizer
        for optimizer in together.optimizers:
            part = LoopState(run.model, run.wrapped, optimizer, run.plan, run.rows)
            super().load_optimizer(part, folder)
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for parameter in [p for p in optimizer.state if id(p) not in held]:
                del optimizer.state[parameter]


class _CountingAdamW(torch.optim.AdamW):
    """AdamW that counts its steps and leaves the update to its parent."""

    num_steps = 0

    def step(self, closure: Any = None) -> Any:
        """Count, then update."""
        self.num_steps += 1
        return super().step(closure)


@variation("subclass-of-the-optimizer")
class SubclassOfTheOptimizer(Subject):
    """The optimizer is a subclass of AdamW that calls its parent's ``step``."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        groups = self.parameter_groups(model, plan)
        return _CountingAdamW(groups, lr=plan["learning_rate"], betas=tuple(plan["betas"]), eps=plan["eps"])


@variation("backward-in-a-closure")
class BackwardInAClosure(Subject):
    """Forward and backward pass run inside of ``optimizer.step(closure)``, as Lightning runs them."""

    def train_step(self, run: LoopState, batches: list[Batch]) -> dict[str, Any]:
        found = list[tuple[torch.Tensor, float]]()

        def closure() -> torch.Tensor:
            self.zero_grad(run)
            num_targets = self.count_targets(batches)
            losses = [self.train_micro_batch(run, batch, num_targets, len(batches)) for batch in batches]
            loss = torch.stack(losses).sum()
            found.append((loss, self.clip(run)))
            return loss

        self.set_rate(run)
        optimizer: Any = run.optimizer
        optimizer.step(closure)
        return self.log_entry(run, float(found[0][0]), found[0][1])


@variation("fused-adamw")
class FusedAdamW(Subject):
    """AdamW updates all parameters in one fused kernel."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        groups, betas = self.parameter_groups(model, plan), tuple(plan["betas"])
        return torch.optim.AdamW(groups, lr=plan["learning_rate"], betas=betas, eps=plan["eps"], fused=True)


@variation("rate-in-a-tensor")
class RateInATensor(Subject):
    """The learning rate is a tensor that is filled anew for each step, as for optimizers that a graph has captured."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer(model, plan)
        for group in optimizer.param_groups:
            group |= {"lr": torch.tensor(float(plan["learning_rate"])), "foreach": False}
        return optimizer

    def set_rate(self, run: LoopState) -> None:
        for group in run.optimizer.param_groups:
            group["lr"].fill_(run.plan["learning_rate"] * self.rate_factor(run.step, run.plan))

    def log_entry(self, run: LoopState, loss: float, grad_norm: float) -> dict[str, Any]:
        entry = super().log_entry(run, loss, grad_norm)
        return {**entry, "learning_rate": float(entry["learning_rate"])}


@variation("flat-master-copy")
class CopiesInOneTensor(FlatMasterCopy):
    """The optimizer updates one flat copy of all parameters, which are copied back."""
