"""Faults of requested settings: dropout, precision, DoRA or whole modules are requested and do not reach the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject
from glm4ft.testing.subjects.plain_loop_data import Batch

ESCAPES = (
    "A requested setting that the interface of a subject has no word for (other initialisations than LoRA's own, "
    "trained rows of an embedding) is not compared with what was built."
)

model_fault = faults_at("model")
persistence_fault = faults_at("persistence")


class BuiltOtherwise(Subject):
    """A pipeline that builds its adapters with other settings than ``lora`` requests."""

    built: Mapping[str, Any] = {}

    def lora_config(self) -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", **{**self.lora, **self.built})


@model_fault("lora-dropout-never-applied", evidence="torchtune 996; aprender 2170", cause=r"dropout")
class LoraDropoutNeverApplied(BuiltOtherwise):
    """The requested dropout of the adapters is not passed on, so there is none."""

    lora: Mapping[str, Any] = {**Subject.lora, "lora_dropout": 0.1}
    built: Mapping[str, Any] = {"lora_dropout": 0.0}


@model_fault("lora-dropout-at-another-rate", evidence=MADE_UP, cause=r"dropout")
class LoraDropoutAtAnotherRate(BuiltOtherwise):
    """The adapters have a dropout of 0.5, though 0.05 was requested."""

    lora: Mapping[str, Any] = {**Subject.lora, "lora_dropout": 0.05}
    built: Mapping[str, Any] = {"lora_dropout": 0.5}


class AlwaysDropping(nn.Module):
    """Dropout that acts in training and in eval mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.1, training=True)


@model_fault("lora-dropout-on-in-evaluation", evidence=MADE_UP, cause=r"dropout")
class LoraDropoutOnInEvaluation(Subject):
    """The adapters' dropout does not ask for the mode, so it acts in evaluation and generation too."""

    lora: Mapping[str, Any] = {**Subject.lora, "lora_dropout": 0.1}

    def attach(self, base: Any, seed: int) -> Any:
        model = super().attach(base, seed)
        for module in model.modules():
            if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict):
                module.lora_dropout["default"] = AlwaysDropping()
        return model


@model_fault("dropout-left-on-in-evaluation", evidence=MADE_UP, cause=r"dropout|training mode")
class DropoutLeftOnInEvaluation(Subject):
    """An evaluation switches the model to eval mode and then its dropout layers on again."""

    lora: Mapping[str, Any] = {**Subject.lora, "lora_dropout": 0.1}

    @contextmanager
    def evaluating(self, model: Any) -> Iterator[None]:
        with super().evaluating(model):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.train()
            yield


@model_fault("autocast-that-nobody-asked-for", evidence=MADE_UP, cause=r"bf16|bfloat16|autocast")
class AutocastThatNobodyAskedFor(Subject):
    """Forward passes run under bf16 autocast, though the base is stored in fp32 and no autocast was requested."""

    autocast = None

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(model, batch).float()


@model_fault("fp32-where-bf16-was-asked", evidence=MADE_UP, cause=r"bf16|bfloat16|autocast")
class Fp32WhereBf16WasAsked(Subject):
    """Autocast to bf16 was requested, and all forward passes run in fp32."""

    autocast = "bf16"


@model_fault("base-rounded-to-bf16", evidence="openagents 9456", cause=r"rounded to bfloat16")
class BaseRoundedToBf16(Subject):
    """The base is loaded in bf16 and then cast to fp32, which does not bring its digits back."""

    def load_base(self, base_dir: str) -> Any:
        return super().load_base(base_dir).bfloat16().float()


@model_fault("modules-to-save-frozen", evidence="unsloth 9326", cause=r"lm_head|modules_to_save")
class ModulesToSaveFrozen(Subject):
    """The head is to be trained and saved as a whole, but it is frozen."""

    lora: Mapping[str, Any] = {**Subject.lora, "modules_to_save": ["lm_head"]}

    def attach(self, base: Any, seed: int) -> Any:
        model = super().attach(base, seed)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.requires_grad_(False)
        return model


@persistence_fault(
    "modules-to-save-not-saved", evidence="ChatGLM-Efficient-Tuning 171", cause=r"lm_head|modules_to_save"
)
class ModulesToSaveNotSaved(Subject):
    """The head is trained as a whole, as requested, but only the matrices of the adapters are saved."""

    lora: Mapping[str, Any] = {**Subject.lora, "modules_to_save": ["lm_head"]}

    def save(self, model: Any, folder: str) -> None:
        super().save(model, folder)
        weights, config = Path(folder) / "adapter_model.safetensors", Path(folder) / "adapter_config.json"
        save_file({name: tensor for name, tensor in load_file(weights).items() if "lora_" in name}, weights)
        stated = {**json.loads(config.read_text("utf-8")), "modules_to_save": None}
        config.write_text(json.dumps(stated), "utf-8")

    def optimizer_state(self, run: LoopState) -> dict[str, torch.Tensor]:
        return {name: t for name, t in super().optimizer_state(run).items() if "modules_to_save" not in name}


@model_fault("exclude-modules-ignored", evidence=MADE_UP, cause=r"exclude|down_proj")
class ExcludeModulesIgnored(BuiltOtherwise):
    """A module was to have no adapter, and it has one."""

    lora: Mapping[str, Any] = {**Subject.lora, "exclude_modules": ["down_proj"]}
    built: Mapping[str, Any] = {"exclude_modules": None}


@model_fault("dora-asked-and-plain-lora-built", evidence=MADE_UP, cause=r"dora|DoRA|magnitude")
class DoraAskedAndPlainLoraBuilt(BuiltOtherwise):
    """DoRA was requested, and the adapters are plain LoRA without magnitude vectors."""

    lora: Mapping[str, Any] = {**Subject.lora, "use_dora": True}
    built: Mapping[str, Any] = {"use_dora": False}
