"""Faults of learning rates by group: the matrices B are to learn faster than A (LoRA+), and do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm4ft.testing.faults.registry import faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject

ESCAPES = (
    "Rates by layer or by module are judged where a subject states them as factors; a recording does not say them."
)

fault = faults_at("schedule")


class LoraPlus(Subject):
    """A pipeline with two parameter groups, whose matrices B learn at four times the rate, as it states."""

    learning_rate_factors: Mapping[str, float] = {"lora_B": 4.0}
    faster = "lora_B"  # what the names of the second group's parameters contain

    def parameter_groups(self, model: Any, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in named if (self.faster in name) == is_faster],
             "weight_decay": plan["weight_decay"]}
            for is_faster in (False, True)
        ]  # fmt: skip

    def set_rate(self, run: LoopState) -> None:
        super().set_rate(run)
        run.optimizer.param_groups[1]["lr"] *= self.learning_rate_factors["lora_B"]


@fault("lora-plus-ignored", evidence="MakazhanAlpamys/Soup 745", cause=r"not applied")
class LoraPlusIgnored(LoraPlus):
    """The ratio of LoRA+ is accepted, and all matrices learn at the base's rate."""

    def set_rate(self, run: LoopState) -> None:
        Subject.set_rate(self, run)


@fault("lora-plus-not-scheduled", evidence="MakazhanAlpamys/Soup 1080", cause=r"does not change|no schedule")
class LoraPlusNotScheduled(LoraPlus):
    """The schedule is bound to another optimizer's groups, so the matrices B keep their peak rate throughout."""

    def set_rate(self, run: LoopState) -> None:
        super().set_rate(run)
        run.optimizer.param_groups[1]["lr"] = run.plan["learning_rate"] * self.learning_rate_factors["lora_B"]


@fault("lora-plus-on-a", evidence="kohya-ss/sd-scripts 1233", cause=r"other parameters, as .*lora_A")
class LoraPlusOnA(LoraPlus):
    """The matrix that a pipeline calls B is the other one, so the matrices A learn faster."""

    faster = "lora_A"
