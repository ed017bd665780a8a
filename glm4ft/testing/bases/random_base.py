"""Writes bases that have the geometry of a published checkpoint but constructed weights, so none is downloaded.

The recipe is that of the built-in base (``glm4ft.model.tiny``), shared head rows included, so that a wrong mask is as
visible on them. Head rows are scaled by one over the root of the hidden size, so that the logits spread as on the
built-in base: at a fixed scale, those of a base 4,096 wide would spread 5.7 times as far, and its first loss would be
the distance to the largest logit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from glm4ft.model.architectures import MODEL_CLASSES
from glm4ft.model.tiny import STOP_TOKENS, constructed_weights, never_sampled_ids
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.testing.bases.geometry import geometry

# The number of rows at the end of GLM-4's vocabulary that belong to no token: ids 151,343 to 151,551.
NUM_PADDING_IDS = 209


def random_config(spec: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PreTrainedConfig:
    """The transformers configuration of a geometry.

    Args:
        spec: The base as ``random:NAME``.
        tokenizer: The tokenizer whose stop and pad tokens the configuration names.
        **changes: The changes of the geometry, by the names of ``config.json``, for a smaller copy.
    """
    values: dict[str, Any] = {**geometry(spec), **changes}
    architecture, theta = values.pop("architecture"), values.pop("rope_theta")
    ids = tokenizer.get_added_vocab()
    config: PreTrainedConfig = MODEL_CLASSES[architecture].config_class(
        **values,
        rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[ids[token] for token in STOP_TOKENS],
    )
    config.architectures = [architecture]
    return config


def write_random_base(
    spec: str, folder: Path, *, dtype: torch.dtype, tokenizer: Any = None, seed: int = 0, **changes: Any
) -> Path:
    """Write a base with the geometry of a published checkpoint, in a checkpoint's file layout.

    Args:
        spec: The base as ``random:NAME``.
        folder: The folder to create and write to.
        dtype: The dtype of the stored weights; each tensor is drawn in fp32 and rounded.
        tokenizer: A real GLM-4 tokenizer; by default the built-in one, whose ids use the first rows of the vocabulary.
        seed: The seed of the weights.
        **changes: The changes of the geometry, by the names of ``config.json``, for a smaller copy.
    Returns:
        The folder.
    """
    model_class = MODEL_CLASSES[geometry(spec)["architecture"]]
    tokenizer = tokenizer or tiny_tokenizer(geometry(spec)["architecture"])
    config = random_config(spec, tokenizer, **changes)
    config.dtype = dtype
    with torch.device("meta"):
        shapes: Mapping[str, torch.Tensor] = dict(model_class(config).named_parameters())
    vocab_size = config.vocab_size
    shared = [*never_sampled_ids(tokenizer), *range(vocab_size - NUM_PADDING_IDS, vocab_size)]
    drawn = constructed_weights(shapes, shared, config.hidden_size, seed)
    folder.mkdir(parents=True)
    save_torch_state_dict({name: weight.to(dtype) for name, weight in drawn}, folder)
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
