"""Requested settings that differ from the plain loop's, carried out as requested: no check may fail on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from glm4ft.testing.faults.rates_by_group import LoraPlus
from glm4ft.testing.faults.token_weights import Weighted
from glm4ft.testing.faults.variations import variation
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.subjects.plain_loop_data import Batch


@variation("rank-and-alpha-patterns")
class RankAndAlphaPatterns(Subject):
    """Some modules have their own rank and scale, as requested."""

    lora: Mapping[str, Any] = {**Subject.lora, "rank_pattern": {"o_proj": 4}, "alpha_pattern": {"self_attn.o_proj": 32}}


@variation("rank-stabilised")
class RankStabilised(Subject):
    """Alpha is divided by the square root of the rank, as requested."""

    lora: Mapping[str, Any] = {**Subject.lora, "use_rslora": True}


@variation("adapter-on-the-head")
class AdapterOnTheHead(Subject):
    """The head has an adapter too."""

    lora: Mapping[str, Any] = {**Subject.lora, "target_modules": [*Subject.lora["target_modules"], "lm_head"]}


@variation("one-layer")
class OneLayer(Subject):
    """Only one layer has adapters, with twice the rank, as requested."""

    lora: Mapping[str, Any] = {**Subject.lora, "layers_to_transform": [1], "r": 16, "lora_alpha": 32}


@variation("dora")
class Dora(Subject):
    """The adapters are DoRA, as requested."""

    lora: Mapping[str, Any] = {**Subject.lora, "use_dora": True}


@variation("excluded-modules")
class ExcludedModules(Subject):
    """One of the target modules is excluded, as requested, and has no adapter."""

    lora: Mapping[str, Any] = {**Subject.lora, "exclude_modules": ["down_proj"]}


@variation("norms-and-embeddings-trained")
class NormsAndEmbeddingsTrained(Subject):
    """All norms and the embeddings are trained beside the adapters, as requested (LongLoRA)."""

    lora: Mapping[str, Any] = {**Subject.lora, "modules_to_save": ["norm", "layernorm", "embed_tokens"]}


@variation("biases-trained")
class BiasesTrained(Subject):
    """The biases of the adapted modules are trained, as requested."""

    lora: Mapping[str, Any] = {**Subject.lora, "bias": "lora_only"}


@variation("adapter-on-the-embedding")
class AdapterOnTheEmbedding(Subject):
    """The embedding has an adapter too, whose A is zero at first, not its B."""

    lora: Mapping[str, Any] = {**Subject.lora, "target_modules": [*Subject.lora["target_modules"], "embed_tokens"]}


@variation("orthogonal-start")
class OrthogonalStart(Subject):
    """A and B start with orthogonal rows, so that their product is zero and neither of them is, as requested."""

    lora: Mapping[str, Any] = {**Subject.lora, "init_lora_weights": "orthogonal"}


@variation("dropout-requested")
class DropoutRequested(Subject):
    """The adapters have the dropout that was requested, in training only."""

    lora: Mapping[str, Any] = {**Subject.lora, "lora_dropout": 0.1}


@variation("bf16-autocast")
class Bf16Autocast(Subject):
    """Forward passes run under bf16 autocast, with parameters and optimizer in fp32."""

    autocast = "bf16"

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(model, batch)


@variation("token-weights")
class TokenWeights(Weighted):
    """Tokens have weights in the loss, whose weighted sum is divided by the sum of the weights."""


@variation("token-weights-over-the-count")
class TokenWeightsOverTheCount(Weighted):
    """Tokens have weights in the loss, whose weighted sum is divided by the number of supervised tokens (ms-swift)."""

    def count_targets(self, batches: Sequence[Batch]) -> int:
        return Subject.count_targets(self, batches)


@variation("lora-plus")
class FasterB(LoraPlus):
    """The matrices B learn at four times the rate of A (LoRA+), as requested."""
