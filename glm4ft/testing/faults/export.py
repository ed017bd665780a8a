"""Faults of merging and exporting."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glm4ft.testing.faults.model import set_lora_scale
from glm4ft.testing.faults.registry import faults_at
from glm4ft.testing.subjects.plain_loop import Subject

ESCAPES = "Exports to other formats than a transformers folder (GGUF, quantised weights, a server's own) are not tried."

fault = faults_at("persistence")


@fault("merge-without-scale", evidence="PEFT 2489; unsloth-zoo 806", cause=r"scale")
class MergeWithoutScale(Subject):
    """The adapter is merged without the factor alpha / r."""

    def merged(self, model: Any) -> Any:
        set_lora_scale(model, 1.0)
        return super().merged(model)


@fault(
    "merge-never-happened",
    evidence="alpaca-lora dde8995; ms-swift 9830, 6664; PEFT 2586",
    cause=r"base|nothing|not merged",
)
class MergeNeverHappened(Subject):
    """The base is exported without the adapter."""

    def merged(self, model: Any) -> Any:
        return model.unload()


@fault("adapter-applied-twice", evidence="PEFT 2306", cause=r"twice|adapter")
class AdapterAppliedTwice(Subject):
    """The adapter is saved beside the merged weights, so loading applies it a second time."""

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        super().merge(base_dir, folder, output)
        for path in Path(folder).glob("adapter_*"):
            (Path(output) / path.name).write_bytes(path.read_bytes())


@fault("merged-stop-ids-lost", evidence="GLM-4 297; LLaMA-Factory 2075; mergekit 275", cause=r"stop|eos_token")
class MergedStopIdsLost(Subject):
    """The merged checkpoint states the tokenizer's end token as its only stop id."""

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        super().merge(base_dir, folder, output)
        (Path(output) / "generation_config.json").unlink()
        path = Path(output) / "config.json"
        stated = {**json.loads(path.read_text("utf-8")), "eos_token_id": self.tokenizer.eos_token_id}
        path.write_text(json.dumps(stated), "utf-8")


@fault(
    "export-key-prefix-wrong",
    evidence="alpaca-lora 6ced8d9",
    cause=r"is missing from the merged|prefix",
)
class ExportKeyPrefixWrong(Subject):
    """Too much of the prefix is removed from the exported keys, so the loader initialises the layers again."""

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        model = self.merged(self.load(base_dir, folder))
        model.save_pretrained(output, state_dict={n.replace("model.layers.", "layers."): t for n, t in tensors(model)})
        self.tokenizer.save_pretrained(output)


def tensors(model: Any) -> list[tuple[str, Any]]:
    """The names and tensors of a model."""
    return list(model.state_dict().items())


@fault(
    "tied-head-merge",
    evidence="PEFT 2025; ms-swift 5261; LLaMA-Factory 6446",
    cause=r"head|tie",
    simulated="the base's weights are not tied; its export states that they are, and stores one matrix for both",
)
class TiedHeadMerge(Subject):
    """An adapter on the head is merged, but saving ties the head to the embedding and loses it."""

    lora: Mapping[str, Any] = {**Subject.lora, "target_modules": [*Subject.lora["target_modules"], "lm_head"]}

    def merged(self, model: Any) -> Any:
        merged = super().merged(model)
        merged.config = copy.deepcopy(merged.config)
        merged.config.tie_word_embeddings = True
        merged.lm_head.weight = merged.get_input_embeddings().weight
        return merged


@fault("merge-delta-transposed", evidence="axolotl d060c803; PEFT 3165", cause=r"q_proj|o_proj|transposed")
class MergeDeltaTransposed(Subject):
    """Square deltas are merged transposed, which their shape does not reveal."""

    def merged(self, model: Any) -> Any:
        for module in model.modules():
            if hasattr(module, "get_delta_weight") and module.weight.shape[0] == module.weight.shape[1]:
                delta = module.get_delta_weight("default")
                module.base_layer.weight.data += delta.T - delta
        return super().merged(model)


@fault(
    "merged-onto-another-base", evidence="unsloth-zoo 810", cause=r"another base|other base|base's weights|not the base"
)
class MergedOntoAnotherBase(Subject):
    """The adapter is merged into a different base than the one it was trained on."""

    def load_other_base(self, base_dir: str, folder: str) -> Any:
        """A base with slightly different weights, with the saved adapter."""
        model, generator = self.load(base_dir, folder), torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_" not in name and p.dim() == 2:
                p.data += 0.02 * p.data.std() * torch.randn(p.shape, generator=generator)
        return model

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        self.merged(self.load_other_base(base_dir, folder)).save_pretrained(output)
        self.tokenizer.save_pretrained(output)
