"""Optimizers that hold copies of the parameters, and their faults: values are lost on the way to or from a copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject, trained

ESCAPES = "Copies that several processes hold a share of each (ZeRO over processes) are not judged."

persistence_fault = faults_at("persistence")
update_fault = faults_at("update")


class FlatMasterCopy(Subject):
    """The optimizer updates one flat copy of all parameters, which are copied back, as in DeepSpeed's ZeRO."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        parameters = trained(model)
        self.sizes = [parameter.numel() for parameter in parameters]
        self.copy = torch.cat([parameter.detach().flatten() for parameter in parameters]).requires_grad_()
        options = {"betas": tuple(plan["betas"]), "eps": plan["eps"], "weight_decay": plan["weight_decay"]}
        return torch.optim.AdamW([self.copy], lr=plan["learning_rate"], **options)

    def zero_grad(self, run: LoopState) -> None:
        run.model.zero_grad()

    def update(self, run: LoopState) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained(run.model)]
        self.copy.grad = torch.cat([gradient.flatten() for gradient in gradients])
        super().update(run)
        with torch.no_grad():
            for parameter, part in zip(trained(run.model), self.copy.split(self.sizes), strict=True):
                parameter.copy_(part.view(parameter.shape))

    def optimizer_state(self, run: LoopState) -> dict[str, torch.Tensor]:
        """The moments and the step count of the flat copy."""
        return dict(run.optimizer.state[self.copy])

    def load_optimizer(self, run: LoopState, folder: Path) -> None:
        """Restore them, and copy the parameters, which the checkpoint has brought."""
        with torch.no_grad():
            self.copy.copy_(torch.cat([parameter.flatten() for parameter in trained(run.model)]))
        run.optimizer.state[self.copy] = load_file(folder / "optimizer.safetensors")


@persistence_fault(
    "resume-master-weights-stale",
    evidence="Megatron-LM 174, 5071; SkyRL 2149; miles 2572",
    cause=r"copies of the weights",
)
class ResumeMasterWeightsStale(FlatMasterCopy):
    """The optimizer's own copies of the weights are older than the checkpoint, and its first step brings them back."""

    def load_optimizer(self, run: LoopState, folder: Path) -> None:
        run.optimizer.state[self.copy] = load_file(folder / "optimizer.safetensors")


@update_fault("copy-never-reaches-the-model", evidence=MADE_UP, cause=r"did not reach the model")
class CopyNeverReachesTheModel(FlatMasterCopy):
    """The optimizer updates its copies, and the parameter that is last in the buffer never receives its own."""

    def update(self, run: LoopState) -> None:
        last = trained(run.model)[-1]
        before = last.detach().clone()
        super().update(run)
        with torch.no_grad():
            last.copy_(before)
