"""All requested targets are adapted; fresh adapters change no output; their weights are a function of the seed.

Run: pytest tests/model/test_lora.py
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from glm4ft.errors import ConfigError
from glm4ft.model.base_model import load_base
from glm4ft.model.lora import AdapterReport, attach_lora, audit_lora
from glm4ft.model.lora_options import GLM4_TARGETS, LoraOptions

IDS = torch.arange(40, 72)[None]
# entries of A and B per unit of rank in one decoder layer of the tiny base: inputs + outputs of the six modules
ENTRIES_PER_RANK = (128 + 128) + 2 * (128 + 64) + (128 + 128) + (128 + 512) + (256 + 128)


def tiny(dtype: str = "fp32") -> PreTrainedModel:
    return load_base("tiny", dtype=dtype, device="cpu").model


def attached(seed: int = 0, dtype: str = "fp32", **options: Any) -> PeftModel:
    return attach_lora(tiny(dtype), LoraOptions(**options), seed=seed)


def adapter_weights(model: PeftModel, part: str = "lora_") -> dict[str, torch.Tensor]:
    found = {name: p.detach() for name, p in model.named_parameters() if part in name}
    assert found
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# --- options ---


@dataclass(frozen=True)
class Wrong:
    options: dict[str, Any]
    where: str
    told: str  # contained in the message


WRONG = [
    Wrong({"rank": 0}, "--lora.rank", "at least 1"),
    Wrong({"rank": 8.0}, "--lora.rank", "whole number"),
    Wrong({"alpha": 0.0}, "--lora.alpha", "more than 0"),
    Wrong({"alpha": float("nan")}, "--lora.alpha", "more than 0"),
    Wrong({"alpha": float("inf")}, "--lora.alpha", "more than 0"),
    Wrong({"dropout": 1.0}, "--lora.dropout", "less than 1"),
    Wrong({"dropout": -0.1}, "--lora.dropout", "at least 0"),
    Wrong({"dropout": float("nan")}, "--lora.dropout", "at least 0"),
    Wrong({"targets": []}, "--lora.targets", "a list of module names"),
    Wrong({"targets": [""]}, "--lora.targets", "a list of module names"),
    Wrong({"targets": "q_proj"}, "--lora.targets", "a list of module names"),
    Wrong({"options": {"use_rlora": True}}, "--lora.options.use_rlora", "use_rslora"),
    Wrong({"options": {"r": 4}}, "--lora.options.r", "--lora.rank"),
    Wrong({"options": {"lora_alpha": 4}}, "--lora.options.lora_alpha", "--lora.alpha"),
    Wrong({"options": {"lora_dropout": 0.1}}, "--lora.options.lora_dropout", "--lora.dropout"),
    Wrong({"options": {"target_modules": ["q_proj"]}}, "--lora.options.target_modules", "--lora.targets"),
    Wrong({"options": {"task_type": "SEQ_CLS"}}, "--lora.options.task_type", "it is CAUSAL_LM"),
    Wrong({"options": {"inference_mode": True}}, "--lora.options.inference_mode", "train nothing"),
    Wrong({"options": {"layers_pattern": "layers"}}, "--lora.options {'layers_pattern'", "layers_to_transform"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(wrong.options))
def test_option_that_cannot_be_used_is_named(wrong: Wrong) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraOptions(**wrong.options)
    assert caught.value.where.startswith(wrong.where)
    assert wrong.told in str(caught.value)


def test_options_reach_peft_under_its_names() -> None:
    options = LoraOptions(4, 2.0, 0.25, ["q_proj"], {"use_rslora": True, "layers_to_transform": [1]})
    config = options.peft_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (4, 2.0, 0.25, {"q_proj"})
    assert (config.use_rslora, config.layers_to_transform, config.task_type) == (True, [1], "CAUSAL_LM")


def test_options_load_without_torch() -> None:
    """The command line needs them to print its help."""
    code = (
        "import sys; from glm4ft.model.lora_options import LoraOptions; LoraOptions(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- attaching ---


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fresh_adapter_changes_nothing(dtype: str) -> None:
    base, model = tiny(dtype), attached(dtype=dtype)
    assert not any(b.any() for b in adapter_weights(model, "lora_B").values())
    assert all(a.any() for a in adapter_weights(model, "lora_A").values())
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_alone_are_trained_and_in_fp32(dtype: str) -> None:
    model = attached(dtype=dtype)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert parameter.dtype == (torch.float32 if dtype == "fp32" or "lora_" in name else torch.bfloat16), name


def test_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = adapter_weights(attached(seed=5))
    torch.manual_seed(2)
    again, other = adapter_weights(attached(seed=5)), adapter_weights(attached(seed=6), "lora_A")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in other)


def test_torch_generator_is_left_as_it_was() -> None:
    model = tiny()
    before = torch.get_rng_state()
    attach_lora(model, LoraOptions(), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("is_training", [False, True])
def test_mode_is_kept(is_training: bool) -> None:
    model = attach_lora(tiny().train(is_training), LoraOptions(dropout=0.5), seed=0)
    assert {module.training for module in model.modules()} == {is_training}


def test_nothing_is_warned_of_that_the_user_did_not_cause() -> None:
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_lora(model, LoraOptions(), seed=0)


def test_warning_about_an_option_reaches_the_user() -> None:
    with pytest.warns(UserWarning, match="exclude_modules"):
        attached(options={"exclude_modules": ["none_such"]})


@pytest.mark.parametrize(("options", "scale"), [({}, 2.0), ({"use_rslora": True}, 16 / 8**0.5)])
def test_branch_is_scaled_by_alpha_over_rank(options: dict[str, Any], scale: float) -> None:
    layer: Any = attached(options=options).base_model.model.model.layers[0].mlp.down_proj
    layer.lora_B["default"].weight.data.fill_(0.5)
    x = torch.ones(1, 256)
    branch = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x) - layer.base_layer(x), scale * branch)


def test_first_weights_can_be_chosen_by_peft_option() -> None:
    model = attached(options={"init_lora_weights": False})
    assert all(b.any() for b in adapter_weights(model, "lora_B").values())


def test_option_that_peft_refuses_late_is_our_error() -> None:
    with pytest.raises(ConfigError, match="peft refuses"):
        attached(options={"bias": "some"})


# --- targets ---


@dataclass(frozen=True)
class Unmatched:
    id: str
    options: dict[str, Any]
    told: tuple[str, ...]


UNMATCHED = [
    Unmatched(  # axolotl's published GLM-4 example
        "axolotl",
        {"targets": ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"]},
        ("gate_proj, up_proj\n", "name gate_up_proj instead", "down_proj, gate_up_proj, k_proj, lm_head"),
    ),
    Unmatched("remote-code-name", {"targets": ["query_key_value"]}, ("query_key_value", "q_proj")),
    Unmatched("part-of-a-name", {"targets": ["proj"]}, ("found:    proj",)),
    Unmatched("layer-beyond", {"options": {"layers_to_transform": [7]}}, ("by layers_to_transform",)),
    Unmatched("excluded", {"options": {"exclude_modules": ["k_proj"]}}, ("found:    k_proj", "by exclude_modules")),
    Unmatched("saved-whole", {"targets": ["lm_head"], "options": {"modules_to_save": ["lm_head"]}}, ("lm_head",)),
    Unmatched("not-linear", {"targets": ["q_proj", "input_layernorm"]}, ("not a linear layer", "Glm4RMSNorm")),
    Unmatched("not-linear-block", {"targets": ["mlp"]}, ("not a linear layer", "layers.0.mlp, a Glm4MLP")),
]


@pytest.mark.parametrize("unmatched", UNMATCHED, ids=lambda unmatched: unmatched.id)
def test_target_that_matches_nothing_is_an_error_and_the_model_is_untouched(unmatched: Unmatched) -> None:
    model = tiny()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ConfigError) as caught:
        attach_lora(model, LoraOptions(**unmatched.options), seed=0)
    for text in unmatched.told:
        assert text in str(caught.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    attach_lora(model, LoraOptions(), seed=0)


def test_model_with_adapters_is_not_wrapped_again() -> None:
    model = attached()
    with pytest.raises(ConfigError, match="adapters already"):
        attach_lora(model.base_model.model, LoraOptions(), seed=0)


# --- the account ---


def test_account_counts_modules_and_parameters() -> None:
    model = attached(rank=4)
    report = audit_lora(model, LoraOptions(rank=4))
    num_base = sum(p.numel() for p in tiny().parameters())
    assert report.num_adapted == dict.fromkeys(GLM4_TARGETS, 2)
    assert report.num_trained == 2 * 4 * ENTRIES_PER_RANK
    assert report.num_total == num_base + report.num_trained
    assert set(report.trained) == set(adapter_weights(model))
    assert report.warnings == ()


def test_account_is_one_line() -> None:
    report = AdapterReport(dict.fromkeys(GLM4_TARGETS, 2), ("a",), 61_440, 499_840, ())
    assert report.describe() == "12 adapters on 6 targets, 61,440 trained of 499,840 parameters (12.3 %)"
    report = AdapterReport({"q_proj": 1}, ("a",), 2_000, 9_400_000_000, ())
    assert report.describe() == "1 adapter on 1 target, 2,000 trained of 9,400,000,000 parameters (2.13e-05 %)"


def test_account_follows_the_layers_that_were_chosen() -> None:
    options = LoraOptions(targets=["q_proj", "layers.0.mlp.down_proj"], options={"layers_to_transform": [0]})
    report = audit_lora(attach_lora(tiny(), options, seed=0), options)
    assert report.num_adapted == {"q_proj": 1, "layers.0.mlp.down_proj": 1}


def test_account_names_what_is_trained_whole() -> None:
    options = LoraOptions(targets=["q_proj"], options={"modules_to_save": ["lm_head"]})
    report = audit_lora(attach_lora(tiny(), options, seed=0), options)
    assert [name for name in report.trained if "lora_" not in name] == [
        "base_model.model.lm_head.modules_to_save.default.weight"
    ]
    assert report.warnings == ()


def test_training_bf16_weights_is_warned_of() -> None:
    options = LoraOptions(options={"modules_to_save": ["lm_head"]})
    report = audit_lora(attach_lora(tiny("bf16"), options, seed=0), options)
    [warning] = report.warnings
    assert warning.startswith("1 trained parameters are in torch.bfloat16, base_model.model.lm_head.modules_to_save")


def test_audit_refuses_a_target_without_an_adapter() -> None:
    model = attached(targets=["q_proj", "k_proj"])
    with pytest.raises(ConfigError, match="matches no module") as caught:
        audit_lora(model, LoraOptions())
    assert caught.value.found == "v_proj, o_proj, gate_up_proj, down_proj"
    assert "down_proj, gate_up_proj, k_proj, lm_head, o_proj, q_proj, v_proj" in caught.value.expected


def test_audit_refuses_a_model_that_trains_nothing() -> None:
    with pytest.raises(ConfigError, match="no parameter is trained"):
        audit_lora(attached().requires_grad_(False), LoraOptions())
