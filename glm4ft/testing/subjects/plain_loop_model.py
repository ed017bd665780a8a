"""The model part of the plain loop: builds, saves, loads and merges a base with LoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm4ft.model.lora_options import GLM4_TARGETS


class Model:
    """Builds, saves, loads and merges a base with LoRA adapters."""

    lora: Mapping[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": list(GLM4_TARGETS)}
    tokenizer: Any

    def build_model(self, base_dir: str, seed: int) -> Any:
        """Load the base and attach untrained adapters."""
        return self.attach(self.load_base(base_dir), seed)

    def load_base(self, base_dir: str) -> Any:
        """Load the base in fp32."""
        return AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)

    def attach(self, base: Any, seed: int) -> Any:
        """Freeze the base and attach adapters, drawn from ``seed``."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(base, self.lora_config())

    def lora_config(self) -> LoraConfig:
        """The peft configuration of the requested adapters."""
        return LoraConfig(task_type="CAUSAL_LM", **self.lora)

    def save(self, model: Any, folder: str) -> None:
        """Write the adapter and its tokenizer."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, base_dir: str, folder: str) -> Any:
        """Load the base with a saved adapter."""
        return PeftModel.from_pretrained(self.load_base(base_dir), folder)

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        """Write the base with the adapter merged into its weights."""
        self.merged(self.load(base_dir, folder)).save_pretrained(output)
        AutoTokenizer.from_pretrained(folder).save_pretrained(output)

    def merged(self, model: Any) -> Any:
        """The base without adapter modules, with the adapters merged into its weights."""
        return model.merge_and_unload()
