"""The built-in tiny GLM-4: a tokenizer and a base model constructed without a download.

The base is *constructed*, not trained, so that it behaves like a pretrained checkpoint in the one respect that
decides whether a wrong loss mask is visible: which tokens its frozen head can express. Three simpler ways fail:

* A random head of small scale cannot overfit at all. The reachable logits are about ``sqrt(hidden) * |head row|``, so
  with hidden 64 and rows of 0.1 per entry even the right mask stops at a loss of 0.5.
* A random head of large scale fits everything, a trained ``<|assistant|>`` header included, so the bug this project
  was founded on (zai-org/GLM-4 issue 342) leaves no trace in the loss.
* A few seconds of pretraining leave rarely seen tokens half trained, and separate the masks by a factor of 2 only.

Here ordinary head rows are large and independent, and the rows of the tokens that are never a positive target in
pretraining (headers, prefix tokens, padding ids) share one small vector. No hidden state can then single one of them
out, so a trained header keeps a loss near the logarithm of their number, while every legitimate target is reachable.

Real heads have both kinds of control tokens. Those that were never trained look like this: Land and Bartolo (EMNLP
2024, arXiv 2405.05417) find undertrained tokens by exactly this likeness of rows, and 11 of the 17 control tokens of
SmolLM2 have certified floors of 2.7 to 2.8 nats. A header that was trained is expressible: with SmolLM2's
``<|im_start|>`` the founding bug leaves no plateau at all, and only mask check and round trip show it
(docs/real-weights.md). Which kind GLM-4's own headers are is open; ``glm4ft floor DATA --model BASE`` tells it of any
checkpoint, with a certificate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from glm4ft.data.turn_format import FormatName
from glm4ft.model.checkpoint import TINY, TINY_GLM4_IDS
from glm4ft.model.portable import write_both_names, write_tokenizer
from glm4ft.model.tiny_tokenizer import (
    CONTROL_TOKENS,
    FORMAT_OF,
    GLM4_ROWS,
    MARKER_TOKENS,
    SAMPLED_MARKERS,
    Architecture,
    tiny_tokenizer,
)

STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_HEAD_WIDTH = 128  # the hidden size for which the scale of the head's rows was chosen
NUM_PADDING_IDS = 64  # vocabulary rows beyond the last token, as GLM-4 has 151,343 to 151,551

# What each class has besides: grouped queries, or the compressed queries and keys of GLM-4.7-Flash; behind the first
# layer eight experts, two of which read each token, and a shared one.
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 32, "attention_bias": True}
_COMPRESSED: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 32, "bos_token_id": None,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
}  # fmt: skip
_CLASSES: dict[Architecture, tuple[Any, Any, dict[str, Any]]] = {
    "Glm4ForCausalLM": (Glm4Config, Glm4ForCausalLM, _GROUPED),
    "GlmForCausalLM": (GlmConfig, GlmForCausalLM, _GROUPED),
    "Glm4MoeForCausalLM": (
        Glm4MoeConfig, Glm4MoeForCausalLM, {**_GROUPED, **_EXPERTS, "use_qk_norm": True, "num_mtp_layers": 0},
    ),
    "Glm4MoeLiteForCausalLM": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, {**_COMPRESSED, **_EXPERTS}),
}  # fmt: skip


def tiny_model(
    seed: int = 0,
    *,
    architecture: Architecture = "Glm4ForCausalLM",
    num_layers: int = 2,
    hidden: int = 128,
    glm4_ids: bool = False,
) -> PreTrainedModel:
    """Build the tiny base model, in fp32 on the CPU.

    Args:
        seed: The seed of every weight.
        architecture: The transformers class.
        num_layers: The number of decoder layers.
        hidden: The hidden size; attention heads have 32 dimensions.
        glm4_ids: Whether control tokens have the ids of GLM-4's own vocabulary of 151,552 rows (155 MB of weights).
    Returns:
        The model in eval mode, with a complete config and generation config.
    """
    tokenizer = tiny_tokenizer(architecture, glm4_ids=glm4_ids)
    stop_ids = [tokenizer.get_added_vocab()[token] for token in STOP_TOKENS]
    config_class, model_class, special = _CLASSES[architecture]
    config = config_class(
        vocab_size=GLM4_ROWS if glm4_ids else len(tokenizer) + NUM_PADDING_IDS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_ids,
        **special,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights first, which are then replaced
        model: PreTrainedModel = model_class(config)
    construct_weights(model, shared_row_ids(tokenizer, config.vocab_size), seed)
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
    model.eval()
    return model


def shared_row_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[int]:
    """List the ids with similar head rows: control tokens that end no turn, and the padding rows of the vocabulary."""
    return never_sampled_ids(tokenizer) + list(range(len(tokenizer), vocab_size))


def never_sampled_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the ids of the control tokens that are never a target in pretraining: all but those that end a turn."""
    ids = tokenizer.get_added_vocab()
    return [ids[token] for token in CONTROL_TOKENS if token not in STOP_TOKENS] + [
        ids[token] for token in MARKER_TOKENS if token in ids and token not in SAMPLED_MARKERS
    ]


@torch.no_grad()
def construct_weights(model: PreTrainedModel, shared_ids: list[int], seed: int) -> None:
    """Fill a GLM-4 model with the constructed weights, in place.

    Args:
        model: A model of one of the family's classes.
        shared_ids: The rows of the head that share a common vector.
        seed: The seed of the generator that draws all weights.
    """
    weights = dict(model.named_parameters())
    for name, drawn in constructed_weights(weights, shared_ids, model.config.hidden_size, seed):
        weights[name].copy_(drawn)


def constructed_weights(
    shapes: Mapping[str, torch.Tensor], shared_ids: list[int], hidden: int, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Draw the constructed weights, one tensor after the other.

    Args:
        shapes: The parameters of a GLM-4 model by name, in the model's order, on any device.
        shared_ids: The rows of the head that share a common vector. Noise of 1e-3 per entry keeps the rows distinct, so
            that labels can be recovered from gradients; at hidden 128 it moves logits by 0.13 nats at most on average,
            far too little to make one of them reachable.
        hidden: The hidden size of the model. Head rows shrink with its square root, so that the spread of the logits is
            the same at any size.
        seed: The seed of the generator that draws all weights.
    Yields:
        The name and the weight of each parameter, fp32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = math.sqrt(_HEAD_WIDTH / hidden)

    def normal(like: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * std

    for name, like in shapes.items():
        if "norm" in name:
            yield name, torch.ones(like.shape)
        elif name.endswith("embed_tokens.weight"):
            yield name, normal(like, 1.0)
        elif name.endswith("lm_head.weight"):
            weight = normal(like, 0.2 * scale)
            common = normal(weight[0], 0.02 * scale)
            weight[shared_ids] = common + normal(weight[shared_ids], 1e-3 * scale)
            yield name, weight
        else:
            yield name, normal(like, 1 / math.sqrt(hidden) if like.dim() > 1 else 0.02)


# The built-in bases by name, each with the options of write_tiny_base.
TINY_BASES: Mapping[str, Mapping[str, Any]] = {
    TINY: {},
    TINY_GLM4_IDS: {"glm4_ids": True},
    **{
        f"{TINY}:{name}": {"architecture": architecture, "chat_format": name}
        for architecture, name in [*FORMAT_OF.items(), ("Glm4ForCausalLM", "glm-z1-0414")]
    },
}


def write_tiny_base(
    folder: str | os.PathLike[str],
    seed: int = 0,
    *,
    architecture: Architecture = "Glm4ForCausalLM",
    chat_format: FormatName | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    glm4_ids: bool = False,
) -> Path:
    """Write the tiny base in the file layout of a real checkpoint.

    Args:
        folder: The folder to create, with config, safetensors, generation config, tokenizer and chat template.
        seed: The seed of the weights.
        architecture: The transformers class.
        chat_format: The chat format of the template, if not the architecture's first; one with the same tokens.
        dtype: The dtype of the stored weights.
        max_shard_size: The size above which the weights are split into shards with an index.
        glm4_ids: Whether control tokens have the ids of GLM-4's own vocabulary, as for ``tiny_model``.
    Returns:
        The folder.
    """
    model = tiny_model(seed, architecture=architecture, glm4_ids=glm4_ids)
    nn.Module.to(model, dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_both_names(Path(folder))
    tokenizer = tiny_tokenizer(architecture, chat_format=chat_format, glm4_ids=glm4_ids)
    write_tokenizer(tokenizer, None, Path(folder))
    return Path(folder)
