"""Faults of the optimizer: its parameters, its settings and its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glm4ft.testing.faults.registry import faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject, trained

ESCAPES = (
    "Optimizers other than AdamW, and settings that a plan does not contain (LoRA+ ratios, schedules of the weight "
    "decay), have no reference to be compared with."
)

fault = faults_at("update")


@fault(
    "bf16-params-lose-updates",
    evidence="torchdistx 52; verl-omni 73; keras 22559",
    cause=r"bf16|bfloat16|rounded|precision",
)
class Bf16ParamsLoseUpdates(Subject):
    """Trained parameters are kept in bf16, where small steps vanish."""

    def update(self, run: LoopState) -> None:
        super().update(run)
        for parameter in trained(run.model):
            parameter.data = parameter.data.bfloat16().float()


@fault("params-not-in-optimizer", evidence="adapters 260; accelerate 2665, 3256", cause=r"optimi[sz]er")
class ParamsNotInOptimizer(Subject):
    """The optimizer was created before the adapters, so it holds the frozen base."""

    def parameter_groups(self, model: Any, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"params": [p for p in model.parameters() if not p.requires_grad]}]


@fault("optimizer-misses-some", evidence="open-rl 80; PEFT 3503; unsloth 9331", cause=r"not in the optimi[sz]er")
class OptimizerMissesSome(Subject):
    """None of the matrices A is in the optimizer."""

    def parameter_groups(self, model: Any, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name]
        return [{"params": found, "weight_decay": plan["weight_decay"]}]


@fault("lr-group-empty", evidence="PEFT 3503, 1973", cause=r"empty|no parameter")
class LrGroupEmpty(Subject):
    """The parameter group with its own learning rate matches no parameter."""

    ratio = 16  # of the learning rate of the matrices B to that of the matrices A, as in LoRA+

    def parameter_groups(self, model: Any, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = [p for p in trained(model) if "lora_B" in type(p).__name__]  # the type of the parameter, not its name
        return [*super().parameter_groups(model, plan), {"params": found, "weight_decay": plan["weight_decay"]}]

    def set_rate(self, run: LoopState) -> None:
        super().set_rate(run)
        run.optimizer.param_groups[-1]["lr"] *= self.ratio


@fault("weight-decay-grouping", evidence="OpenRLHF 1253; ms-swift 7980", cause=r"weight_decay|decay")
class WeightDecayGrouping(Subject):
    """Weight decay is not applied to the matrices B."""

    def parameter_groups(self, model: Any, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in named if ".lora_A." in name], "weight_decay": plan["weight_decay"]},
            {"params": [p for name, p in named if ".lora_A." not in name], "weight_decay": 0.0},
        ]


@fault("l2-in-place-of-decoupled", evidence="DeepCrime operator OCH; Humbatova 2020", cause=r"optimizer is Adam\b")
class L2InPlaceOfDecoupled(Subject):
    """Adam, which adds the weight decay to the gradient, is used instead of AdamW."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        groups = self.parameter_groups(model, plan)
        return torch.optim.Adam(groups, lr=plan["learning_rate"], betas=tuple(plan["betas"]), eps=plan["eps"])
