"""Faults of base and adapter set-up: the trained model is not the requested one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.recording.discovery import decoder_of
from glm4ft.testing.subjects.plain_loop import Conversations, LoopState, Subject, trained
from glm4ft.testing.subjects.plain_loop_data import Batch, Features

ESCAPES = (
    "The reference also uses the forward pass of transformers, so both sides share a bug of that library's GLM-4; and "
    "adapters of kinds that the reference does not know (PiSSA, biases of B) are judged only before training."
)

fault = faults_at("model")


class OtherConfig(Subject):
    """A pipeline that loads the base with a changed configuration."""

    def change(self, config: Any) -> None:
        """Change the configuration in place."""

    def load_base(self, base_dir: str) -> Any:
        """A model with the weights of the folder and the changed configuration."""
        config = AutoConfig.from_pretrained(base_dir)
        self.change(config)
        return AutoModelForCausalLM.from_pretrained(base_dir, config=config, dtype=torch.float32)


@fault("rope-not-partial", evidence="mlx-lm 1698", cause=r"rotary|rope")
class RopeNotPartial(OtherConfig):
    """Rotary embedding is applied to all of each head, while GLM-4 rotates half of it."""

    def change(self, config: Any) -> None:
        config.rope_parameters["partial_rotary_factor"] = 1.0


@fault("rope-base-differs", evidence="torchtune 997", cause=r"rotary|rope")
class RopeBaseDiffers(OtherConfig):
    """The code that builds the adapted model uses a different RoPE base than the code for full fine-tuning."""

    def change(self, config: Any) -> None:
        config.rope_parameters["rope_theta"] = 500_000.0


@fault("norm-eps-differs", evidence="torchtune 409", cause=r"eps")
class NormEpsDiffers(OtherConfig):
    """The code that builds the adapted model uses a different epsilon in its norms."""

    def change(self, config: Any) -> None:
        config.rms_norm_eps = 1e-6


@fault("norm-variant-swapped", evidence="axolotl 1886; InfiniLM 352", cause=r"norm")
class NormVariantSwapped(Subject):
    """A patched block lacks the norm that GLM-4 has after attention."""

    def load_base(self, base_dir: str) -> Any:
        base = super().load_base(base_dir)
        base.model.layers[0].post_self_attn_layernorm = nn.Identity()
        return base


@fault("square-weight-transposed", evidence="unsloth-zoo 913", cause=r"o_proj|transposed")
class SquareWeightTransposed(Subject):
    """A square weight is transposed on loading, since its layout was guessed from its shape."""

    def load_base(self, base_dir: str) -> Any:
        base = super().load_base(base_dir)
        weight = base.model.layers[0].self_attn.o_proj.weight
        weight.data = weight.data.T.contiguous()
        return base


def set_lora_scale(model: Any, scale: float) -> None:
    """Set the scale of every adapter."""
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = scale


@fault("lora-scale-missing", evidence="PEFT 2489, 2775", cause=r"scale")
class LoraScaleMissing(Subject):
    """The forward pass omits the factor alpha / r."""

    def attach(self, base: Any, seed: int) -> Any:
        model = super().attach(base, seed)
        set_lora_scale(model, 1.0)
        return model


@fault("rslora-scale-mixed", evidence="PEFT 2775, 1930", cause=r"scale")
class RsloraScaleMixed(Subject):
    """The forward pass divides alpha by the square root of r, everything else divides it by r."""

    def attach(self, base: Any, seed: int) -> Any:
        model = super().attach(base, seed)
        set_lora_scale(model, self.lora["lora_alpha"] / self.lora["r"] ** 0.5)
        return model


@fault("rank-alpha-pattern-ignored", evidence="PEFT 2195, 3315", cause=r"scale|alpha")
class RankAlphaPatternIgnored(Subject):
    """The alpha of a module is looked up under the key that matched its rank, and not found."""

    lora: Mapping[str, Any] = {
        **Subject.lora, "rank_pattern": {"o_proj": 4}, "alpha_pattern": {"self_attn.o_proj": 32},
    }  # fmt: skip

    def lora_config(self) -> LoraConfig:
        found = {key: self.lora["alpha_pattern"].get(key) for key in self.lora["rank_pattern"]}
        alphas = {key: alpha for key, alpha in found.items() if alpha}
        return LoraConfig(task_type="CAUSAL_LM", **{**self.lora, "alpha_pattern": alphas})


@fault("targets-partially-matched", evidence="PEFT 3534; unsloth 9331", cause=r"gate_proj|up_proj")
class TargetsPartiallyMatched(Subject):
    """Two of the target modules do not exist in GLM-4, and no error reports it."""

    lora: Mapping[str, Any] = {
        **Subject.lora,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }


@fault(
    "layer-index-regex-greedy",
    evidence="PEFT 3318",
    cause=r"layers\.\d",
    simulated="names of GLM-4 modules contain only one number, so the wrong layer is configured directly",
)
class LayerIndexRegexGreedy(Subject):
    """A layer's number is read from the wrong part of a module's name, so other layers get the adapters."""

    lora: Mapping[str, Any] = {**Subject.lora, "layers_to_transform": [1]}

    def lora_config(self) -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", **{**self.lora, "layers_to_transform": [0]})


class Frozen(Subject):
    """A pipeline in which no parameter is trained, though the loop runs to its end."""

    def freeze(self, model: Any) -> Any:
        """Switch off every gradient except that of the embedding's output, which checkpointing needs."""
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return model

    def parameter_groups(self, model: Any, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The adapter parameters, found by name since none requires a gradient."""
        return [{"params": [p for name, p in model.named_parameters() if "lora_" in name]}]

    def clip(self, run: Any) -> float:
        """Skip clipping, since there is no gradient; returns a norm of 0."""
        return 0.0


@fault(
    "adapter-loaded-frozen", evidence="PEFT 282; transformers 24463; TRL 6700", cause=r"no .*trained|trainable|frozen"
)
class AdapterLoadedFrozen(Frozen):
    """A saved adapter is loaded in inference mode, which freezes it, and then trained."""

    def attach(self, base: Any, seed: int) -> Any:
        return self.freeze(super().attach(base, seed))


@fault("kbit-prepare-refreezes", evidence="TRL 4081", cause=r"no .*trained|trainable|frozen")
class KbitPrepareRefreezes(Frozen):
    """A function that freezes the base is called after the adapters were attached, and freezes them too."""

    def build_model(self, base_dir: str, seed: int) -> Any:
        return self.freeze(super().build_model(base_dir, seed))


@fault("fused-head-bypasses-lora", evidence="unsloth 9331", cause=r"lm_head")
class FusedHeadBypassesLora(Subject):
    """The loss uses the head's weight directly, so an adapter on the head has no effect."""

    lora: Mapping[str, Any] = {**Subject.lora, "target_modules": [*Subject.lora["target_modules"], "lm_head"]}

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        hidden = decoder_of(model).body(**inputs, use_cache=False).last_hidden_state
        logits: torch.Tensor = hidden @ model.base_model.model.lm_head.base_layer.weight.T
        return logits


@fault(
    "new-token-rows-untrained", evidence="axolotl 787; qlora 190d22a; LLaMA-Factory 7997", cause=r"new|vocabulary|rows?"
)
class NewTokenRowsUntrained(Subject):
    """A token is added to the vocabulary, while its rows of embedding and head are neither trained nor saved."""

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        spec = json.loads(self._plain.to_str())
        spec["model"]["vocab"]["\u0120so"] = len(self.tokenizer)
        spec["model"]["merges"].insert(0, ["\u0120s", "o"])
        self._plain = Tokenizer.from_str(json.dumps(spec))


@fault(
    "dora-magnitude-uninitialised",
    evidence="torchtune 1909, 2139",
    cause=r"magnitude|finite",
    simulated="the contents of uninitialised memory vary, so the vectors are filled with ten thousand",
)
class DoraMagnitudeUninitialised(Subject):
    """The magnitude vectors of DoRA are left uninitialised."""

    lora: Mapping[str, Any] = {**Subject.lora, "use_dora": True}

    def attach(self, base: Any, seed: int) -> Any:
        model = super().attach(base, seed)
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                nn.init.constant_(parameter, 1e4)
        return model


@fault(
    "adapter-dtype-changed",
    evidence="PEFT 2893; ms-swift 9832",
    cause=r"bfloat16|dtype",
)
class AdapterDtypeChanged(Subject):
    """The adapters are cast to bf16, though they were to be trained in fp32."""

    def attach(self, base: Any, seed: int) -> Any:
        model = super().attach(base, seed)
        for parameter in trained(model):
            parameter.data = parameter.data.bfloat16()
        return model


@fault(
    "cast-to-packed-dtype",
    evidence="unsloth-zoo 482",
    cause=r"dtype|activations",
    simulated="the weight stays floating point, and its input is cast to the integer dtype of a packed weight",
)
class CastToPackedDtype(Subject):
    """Activations are cast to the dtype of a quantised weight, which is an integer type."""

    def load_base(self, base_dir: str) -> Any:
        base = super().load_base(base_dir)
        projection = base.model.layers[0].mlp.down_proj
        projection.register_forward_pre_hook(lambda module, args: (args[0].to(torch.int8).to(args[0].dtype),))
        return base


@fault("module-drawn-anew", evidence=MADE_UP, cause=r"random|anew|initiali[sz]ed|drawn")
class ModuleDrawnAnew(Subject):
    """One weight is not found in the checkpoint, so the loader initializes it at random and only warns."""

    def load_base(self, base_dir: str) -> Any:
        base = super().load_base(base_dir)
        weight = base.model.layers[1].mlp.down_proj.weight
        weight.data = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        return base


@fault("evaluated-without-adapters", evidence="verl 3830", cause=r"without its adapters")
class EvaluatedWithoutAdapters(Subject):
    """The evaluations of a run judge the base: the adapters are off in them."""

    def score(self, model: Any, rows: Sequence[Features]) -> dict[str, float]:
        with model.disable_adapter():
            return super().score(model, rows)


@fault("noise-on-the-embeddings", evidence=MADE_UP, cause=r"in training alone")
class NoiseOnTheEmbeddings(Subject):
    """Noise is added to the embeddings in training (NEFTune) that nobody asked for."""

    def begin(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> LoopState:
        def add_noise(embedding: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor | None:
            largest = 5 / (embedded.shape[1] * embedded.shape[2]) ** 0.5
            return embedded + torch.empty_like(embedded).uniform_(-largest, largest) if embedding.training else None

        model.get_input_embeddings().register_forward_hook(add_noise)
        return super().begin(model, conversations, plan)
