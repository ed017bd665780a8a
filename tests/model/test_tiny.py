"""The built-in base behaves like a pretrained checkpoint where it matters: which tokens its frozen head can express.

Run: pytest tests/model/test_tiny.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.format_check import detect_format
from glm4ft.data.inputs import DEMO_DATA
from glm4ft.data.reader import read_conversations
from glm4ft.model.tiny import CONTROL_TOKENS, STOP_TOKENS, shared_row_ids, tiny_model, tiny_tokenizer, write_tiny_base
from glm4ft.testing.strategies import text_contents

ARCHITECTURES = ["Glm4ForCausalLM", "GlmForCausalLM"]
SHARED_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|assistant|>"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(architecture=request.param)


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_a_function_of_the_seed(architecture: Any) -> None:
    """They are bitwise equal whatever the state of torch's generator; another seed changes every random matrix."""
    torch.manual_seed(1)
    first = tiny_model(3, architecture=architecture).state_dict()
    torch.manual_seed(2)
    again = tiny_model(3, architecture=architecture).state_dict()
    other = tiny_model(4, architecture=architecture).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


def test_shared_rows_are_the_tokens_that_no_model_ever_samples(model: Any) -> None:
    """These are control tokens that end no turn, and the vocabulary's padding rows (151,343 to 151,551 in GLM-4)."""
    tokenizer = tiny_tokenizer()
    shared = set(shared_row_ids(tokenizer, model.config.vocab_size))
    assert set(tokenizer.convert_tokens_to_ids(SHARED_TOKENS)) <= shared
    assert set(range(len(tokenizer), model.config.vocab_size)) <= shared
    assert shared.isdisjoint(tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)))
    assert shared.isdisjoint(range(tokenizer.convert_tokens_to_ids(CONTROL_TOKENS[0])))


def test_no_hidden_state_tells_shared_rows_apart_and_every_other_row_stands_out(model: Any) -> None:
    """The final norm gives |h| = sqrt(hidden), so |h| * |row - row'| bounds the difference of two logits.

    Measured (seed 0, CPU, 2026-11): at most 0.23 nats between two shared rows, 0.13 to 0.16 from their mean; at least
    27 between two ordinary ones. The limits are twice and half of that.
    """
    shared = shared_row_ids(tiny_tokenizer(), model.config.vocab_size)
    is_shared = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    is_shared[shared] = True
    head, reach = model.lm_head.weight.detach(), math.sqrt(model.config.hidden_size)
    assert float(torch.pdist(head[is_shared]).max()) * reach < 0.46
    assert float(torch.pdist(head[~is_shared]).min()) * reach > 13.5
    assert float(torch.pdist(head[is_shared]).min()) > 0, "rows that are equal could not be told apart in gradients"


def test_stop_tokens_are_ordinary(model: Any) -> None:
    """A trained terminator must be reachable, so rows of stop tokens are as long as those of text (per entry 0.2)."""
    head = model.lm_head.weight.detach()
    stops = tiny_tokenizer().convert_tokens_to_ids(list(STOP_TOKENS))
    assert head[stops].std().item() == pytest.approx(0.2, rel=0.1)
    assert head[:478].std().item() == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_first_loss_is_that_of_a_base_that_knows_nothing(model: Any, seed: int) -> None:
    """Logits are about N(0, hidden * 0.2^2), whose expected loss is ln V + hidden * 0.2^2 / 2 = 6.3 + 2.6 = 8.9.

    Measured on the 115 targets of the demo conversations with seeds 0 to 7, CPU, fp32, 2026-11: 7.99 to 9.01.
    """
    architecture = type(model).__name__
    tokenizer = tiny_tokenizer(architecture)
    base = tiny_model(seed, architecture=architecture)
    assert math.log(base.config.vocab_size) == pytest.approx(6.3, abs=0.05)
    chat_format = ChatFormat(detect_format([architecture], tokenizer), tokenizer)
    rows = [chat_format.encode(conversation) for conversation in read_conversations(DEMO_DATA)]
    losses = []
    with torch.no_grad():
        for row in rows:
            logits_TV = base(torch.tensor([row.input_ids])).logits[0, :-1]
            losses.append(F.cross_entropy(logits_TV, torch.tensor(row.labels[1:]), reduction="none"))
    total, num_targets = float(torch.cat(losses).sum()), sum(sum(row.supervised) for row in rows)
    assert num_targets == 115
    assert 7.5 < total / num_targets < 9.5


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_folder_has_the_layout_of_a_real_checkpoint(architecture: Any, tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / "base", 5, architecture=architecture, max_shard_size="500KB")
    stops = tiny_tokenizer().convert_tokens_to_ids(list(STOP_TOKENS))
    config, generation = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert config["architectures"] == [architecture]
    assert config["eos_token_id"] == generation["eos_token_id"] == stops
    assert config["pad_token_id"] == generation["pad_token_id"] == stops[0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert all((folder / shard).is_file() for shard in shards)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_loads_as_it_was(architecture: Any, tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path, 5, architecture=architecture)
    loaded, made = AutoModelForCausalLM.from_pretrained(folder), tiny_model(5, architecture=architecture)
    assert type(loaded).__name__ == architecture
    weights = loaded.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in made.state_dict().items())
    tokenizer, expected = AutoTokenizer.from_pretrained(folder), tiny_tokenizer(architecture)
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert (tokenizer.chat_template, tokenizer.padding_side) == (expected.chat_template, "right")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"


def test_bf16_weights_are_stored_as_bf16(tmp_path: Path) -> None:
    weights = load_file(write_tiny_base(tmp_path, dtype=torch.bfloat16) / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


# --- tokenizer ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_tokenizer() -> Any:
    return tiny_tokenizer()


@given(text=text_contents())
@example(text="\x00\ud7ff\U0010ffff")
def test_any_text_survives_the_tokenizer(one_tokenizer: Any, text: str) -> None:
    ids = one_tokenizer.encode(text, add_special_tokens=False)
    assert one_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert max(ids) < len(one_tokenizer)


@pytest.mark.parametrize("content", ["\n", "\nx", "\n\nx", "\n 好"])
def test_a_newline_encoded_apart_gives_other_ids_for_some_content(content: str) -> None:
    """Otherwise a trainer that encodes the header's newline separately would not be detected."""
    tokenizer = tiny_tokenizer()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert encode("\n" + content) != encode("\n") + encode(content)


def test_control_tokens_are_those_of_glm4_in_its_order() -> None:
    """They have the ids 151329 to 151342 in GLM-4; here too they follow the ordinary vocabulary."""
    tokenizer = tiny_tokenizer()
    added = tokenizer.get_added_vocab()
    assert sorted(added, key=added.__getitem__) == list(CONTROL_TOKENS)
    assert [added[token] for token in CONTROL_TOKENS] == [*range(len(tokenizer) - len(CONTROL_TOKENS), len(tokenizer))]
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"], "no post-processor"
