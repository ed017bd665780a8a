"""The decoder of any causal language model is found by its structure.

Run: pytest tests/testing/recording/test_discovery.py
"""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from glm4ft.testing.recording.discovery import NotFound, decoder_of

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gpt2": ({"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32}, ("transformer", "wte", "ln_f")),
    "gpt_neox": (SMALL, ("gpt_neox", "embed_in", "final_layer_norm")),
    "bloom": (
        {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32},
        ("transformer", "word_embeddings", "ln_f"),
    ),
    "mixtral": ({**SMALL, "num_key_value_heads": 2}, ("model", "embed_tokens", "norm")),
    "qwen2": ({**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}, ("model", "embed_tokens", "norm")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_is_found_below_adapters_and_wrappers(family: str) -> None:
    options, (body, embedding, norm) = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, pad_token_id=0, **options))
    found = decoder_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(m)] for m in (found.body, found.embedding, found.norm, found.head)] == [
        body, f"{body}.{embedding}", f"{body}.{norm}", names[id(model.get_output_embeddings())],
    ]  # fmt: skip
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=1, target_modules="all-linear"))
    assert decoder_of(nn.Sequential(adapted)) == found


class Own(nn.Module):
    """A model of one's own, which states neither embedding nor head."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleDict({"words": nn.Embedding(4, 4), "last": nn.LayerNorm(4)})
        self.out = nn.Linear(4, 4)


def test_model_of_ones_own_is_found_by_three_names() -> None:
    model = Own()
    with pytest.raises(NotFound, match="0 decoders"):
        decoder_of(model)
    found = decoder_of(model, ("words", "decoder.last", "out"))
    assert (found.body, found.norm, found.head) == (model.decoder, model.decoder["last"], model.out)
    with pytest.raises(NotFound, match="0 modules are named lost"):
        decoder_of(model, ("words", "lost", "out"))
