"""A tiny dense Llama in ChatML, for what must hold for bases outside the GLM-4 family too.

Its head is drawn like that of the built-in base, but no rows are shared: in ChatML models the control tokens of the
template are trained (measured on SmolLM2, see docs/real-weights.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glm4ft.model.tiny import constructed_weights
from glm4ft.model.tiny_tokenizer import tiny_tokenizer

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Make the built-in tokenizer's vocabulary with ChatML's control tokens in place of GLM-4's."""
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    plain = type(backend)(backend.model)
    plain.pre_tokenizer, plain.decoder = backend.pre_tokenizer, backend.decoder
    plain.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|endoftext|>", START, END)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=END, pad_token="<|endoftext|>", padding_side="right",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = CHATML
    return made


def write_chatml_base(folder: Path, seed: int = 0) -> Path:
    """Write the base in the file layout of a checkpoint.

    Args:
        folder: The folder to create.
        seed: The seed of the weights.
    Returns:
        The folder.
    """
    tokenizer = chatml_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, drawn in constructed_weights(weights, [], config.hidden_size, seed):
            weights[name].copy_(drawn)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
