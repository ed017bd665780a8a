"""The specification of layers with experts computes what transformers' classes compute, and it notices a wrong router.

Run: pytest tests/testing/specification/test_routed_experts.py
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from glm4ft.model.tiny import tiny_model, write_tiny_base
from glm4ft.testing.specification import routed_experts
from glm4ft.testing.specification.lora_spec import LoraSpec
from glm4ft.testing.specification.reference import Reference
from glm4ft.testing.specification.routed_experts import NEEDED, specify_experts, too_old

ARCHITECTURES = ("Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM")
pytestmark = pytest.mark.skipif(bool(too_old()), reason=f"models with experts need {NEEDED}; found {too_old()}")
IDS = tuple(torch.randint(0, 200, (60,), generator=torch.Generator().manual_seed(0)).tolist())
LIMIT = 1e-5  # that of the model's stage; measured 4e-7 (x86-64 CPU, 2026-11-27)


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([IDS])).logits
    return found


def changed_router(model: Any, **options: Any) -> Any:
    """A model whose routers have a bias, groups and a scale of their own, as the true checkpoints' have."""
    for name, value in options.items():
        setattr(model.config, name, value)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            generator = torch.Generator().manual_seed(1)
            module.e_score_correction_bias.copy_(torch.randn(8, generator=generator) / 4)
            module.num_group, module.topk_group = model.config.n_group, model.config.topk_group
            module.norm_topk_prob = model.config.norm_topk_prob
            module.routed_scaling_factor = model.config.routed_scaling_factor
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    ],
    ids=["as GLM-4.5", "groups"],
)
def test_it_computes_what_transformers_computes(architecture: Any, options: dict[str, Any]) -> None:
    """Also where the choice depends on groups and on a bias that the weights do not contain."""
    model = changed_router(tiny_model(architecture=architecture), **options)
    expected = logits(model)
    plain = logits(changed_router(tiny_model(architecture=architecture), **(options | {"topk_group": 1, "n_group": 1})))
    specify_experts(model)
    assert off(logits(model), expected) <= LIMIT
    assert options["n_group"] == 1 or off(plain, expected) > 0.01


def wrong(old: str, new: str) -> Any:
    """The module's functions with one mistake in their source."""
    source = inspect.getsource(routed_experts)
    assert source.count(old) == 1
    namespace: dict[str, Any] = {"__name__": routed_experts.__name__}
    exec(compile(source.replace(old, new), "wrong", "exec"), namespace)
    return namespace["specify_experts"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(scores_TE + bias_E)", "scores_TE"),
        ("scores_TE * chosen_TE", "(scores_TE + bias_E) * chosen_TE"),
        ("torch.sigmoid(", "torch.softmax(dim=1, input="),
        ("weights_TE / weights_TE.sum(1, keepdim=True)", "weights_TE"),
        ("config.num_experts_per_tok)", "config.num_experts_per_tok - 1)"),
        ("* float(config.routed_scaling_factor)", ""),
    ],
)
def test_a_mistake_in_it_would_show(old: str, new: str) -> None:
    """Each part of the router's arithmetic moves the logits by far more than rounding."""
    options = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    model = changed_router(tiny_model(architecture="Glm4MoeForCausalLM"), **options)
    expected = logits(model)
    wrong(old, new)(model)
    assert off(logits(model), expected) > 100 * LIMIT


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"), architecture=request.param)


@pytest.mark.parametrize(
    "parameters", [["experts.gate_up_proj"], ["experts.down_proj"], ["experts.down_proj", "experts.gate_up_proj"]]
)
def test_fused_experts_are_adapted_as_peft_adapts_them(base: Path, parameters: list[str]) -> None:
    """Each expert has its own A and B, and which parameter a pair adapts is seen by its shape, not by its name."""
    asked: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["o_proj"], "target_parameters": parameters}
    spec = LoraSpec.of(asked)
    reference = Reference(base, spec)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **asked)
    adapted: Any = get_peft_model(type(reference.model).from_pretrained(base), config)
    trained = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
    found = reference.adapters(trained)
    assert set(found) == set(spec.modules_of(reference.model))
    assert {name for name in found if "experts" in name} == {f"model.layers.1.mlp.{name}" for name in parameters}
    assert all(reference.rank_of(name, pair, trained) == {3} for name, pair in found.items())
    got = reference.logits(reference.hidden(IDS, trained), trained)
    assert off(got, logits(adapted.eval())[0]) <= LIMIT
    for name, delta in reference.deltas(trained).items():
        merged = copy.deepcopy(adapted).merge_and_unload().get_parameter(name)
        assert off(merged - reference.weights[name], delta) <= LIMIT
