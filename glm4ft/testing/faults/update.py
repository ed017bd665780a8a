"""Faults of the optimizer: its parameters, its settings and its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject, trained
from glm4ft.testing.subjects.plain_loop_data import Batch

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


@fault("betas-swapped", evidence=MADE_UP, cause=r"betas")
class BetasSwapped(Subject):
    """The two betas are passed in the wrong order."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        return super().make_optimizer(model, {**plan, "betas": tuple(plan["betas"])[::-1]})


class OwnAdamW(Subject):
    """A pipeline with an AdamW written by hand, and one method for each part of it that can go wrong."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        return AdamW(self.parameter_groups(model, plan), plan, self)

    def stored(self, moment: torch.Tensor) -> torch.Tensor:
        """A moment with the precision in which it is kept."""
        return moment

    def correction(self, beta: float, step: float) -> float:
        """The divisor that corrects a moment for its start at zero."""
        return float(1 - beta**step)

    def root(self, second: torch.Tensor, eps: float) -> torch.Tensor:
        """The divisor of the update, from the corrected second moment."""
        return second.sqrt() + eps


class AdamW(torch.optim.Optimizer):
    """The optimizer of :class:`OwnAdamW`; it has the name of torch's, since that is what a report shows.

    Args:
        params: The parameter groups.
        plan: The plan with the settings.
        parts: The pipeline with the parts of the update.
    """

    def __init__(self, params: Any, plan: Mapping[str, Any], parts: OwnAdamW) -> None:
        settings = {"lr": plan["learning_rate"], "betas": tuple(plan["betas"]), "eps": plan["eps"]}
        super().__init__(params, {**settings, "weight_decay": plan["weight_decay"]})
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the moments and parameters of every group."""
        for group in self.param_groups:
            for parameter in [p for p in group["params"] if p.grad is not None]:
                state = self.state[parameter]
                if not state:
                    zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    state.update(step=torch.tensor(0.0), **zeros)
                state["step"] += 1
                self.update(parameter, state, group)

    def update(self, parameter: Any, state: dict[str, torch.Tensor], group: Mapping[str, Any]) -> None:
        """Update the moments of one parameter, then the parameter."""
        (beta1, beta2), step, gradient = group["betas"], float(state["step"]), parameter.grad
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(gradient, 1 - beta1).copy_(self.parts.stored(first))
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).copy_(self.parts.stored(second))
        divisor = self.parts.root(second / self.parts.correction(beta2, step), group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(first / self.parts.correction(beta1, step), divisor, value=-group["lr"])


@fault("moments-cleared-each-epoch", evidence="deepsensor 47; cymetric 4; keras 13750", cause=r"moments were cleared")
class MomentsClearedEachEpoch(Subject):
    """Every epoch begins with a new optimizer, whose moments are zero."""

    def train_step(self, run: LoopState, batches: list[Batch]) -> dict[str, Any]:
        rows_in_step = run.plan["micro_batch_size"] * run.plan["accumulation"]
        if run.step % -(-len(run.rows) // rows_in_step) == 0:
            run.optimizer.state.clear()
        return super().train_step(run, batches)


@fault("steps-twice", evidence="physicsnemo 1911; ECO-pytorch 1", cause=r"more than once per gradient")
class StepsTwice(Subject):
    """A wrapper takes the optimizer step, and the loop takes it again with the same gradient."""

    def update(self, run: LoopState) -> None:
        super().update(run)
        super().update(run)


@fault("no-bias-correction", evidence=MADE_UP, cause=r"bias")
class NoBiasCorrection(OwnAdamW):
    """AdamW does not correct its moments for their start at zero."""

    def correction(self, beta: float, step: float) -> float:
        return 1.0


@fault("moments-rounded-to-bf16", evidence=MADE_UP, cause=r"bf16|bfloat16|moment")
class MomentsRoundedToBf16(OwnAdamW):
    """The optimizer's moments are rounded to bf16 in every step, though their dtype is fp32."""

    def stored(self, moment: torch.Tensor) -> torch.Tensor:
        return moment.bfloat16().float()


@fault("eps-inside-the-root", evidence=MADE_UP, cause=r"\beps")
class EpsInsideTheRoot(OwnAdamW):
    """Epsilon is added to the second moment before its square root is taken, not after."""

    def root(self, second: torch.Tensor, eps: float) -> torch.Tensor:
        return (second + eps).sqrt()
