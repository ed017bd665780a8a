"""Faults of optimizers that hold copies of the parameters: between copy and model, values are lost either way."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from glm4ft.testing.faults.benign_optimizers import FlatMasterCopy
from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, trained

persistence_fault = faults_at("persistence")
update_fault = faults_at("update")


@persistence_fault(
    "stale-copies-after-resume",
    evidence="Megatron-LM 174, 5071; SkyRL 2149",
    cause=r"copies of the weights",
)
class StaleCopiesAfterResume(FlatMasterCopy):
    """The copies are made before the checkpoint is loaded, and the first step brings them back."""

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
