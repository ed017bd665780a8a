"""Bases of the true geometry with constructed weights: the size of a checkpoint without the checkpoint.

The recipe is that of the built-in base (``glm4ft.model.tiny``), shared head rows included, so that a wrong mask is as
visible on them. Head rows shrink with the root of the width, so that logits spread as on the built-in base: rows of one
scale would spread those of a base 4,096 wide 5.7 times as far, and its first loss would be the distance of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from glm4ft.model.base_model import MODEL_CLASSES
from glm4ft.model.tiny import STOP_TOKENS, constructed_weights, never_sampled_ids, tiny_tokenizer
from glm4ft.testing.bases.geometry import geometry

# GLM-4 ends its vocabulary with 209 rows for no token: ids 151,343 to 151,551.
NUM_PADDING_IDS = 209


def random_config(spec: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PreTrainedConfig:
    """The configuration of a geometry.

    Args:
        spec: ``random:NAME``.
        tokenizer: whose stop and pad tokens it names.
        **changes: of the geometry, in the names of ``config.json``, for a smaller copy.
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
    """Write a base of a true geometry in the file layout of a checkpoint.

    Args:
        spec: ``random:NAME``.
        folder: is created.
        dtype: of the stored weights; each tensor is drawn in fp32 and rounded.
        tokenizer: a real GLM-4 one; by default the built-in one, whose ids use the first rows of the vocabulary.
        seed: of the weights.
        **changes: of the geometry, for a smaller copy.
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
