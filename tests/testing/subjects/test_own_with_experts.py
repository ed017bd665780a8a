"""The own trainer is right on bases with experts, by the replay with routers; a wrong model or adapter is red there.

The rest of the suite holds there too: ``tox run -e formats``.

Run: pytest tests/testing/subjects/test_own_with_experts.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4ft.model.lora_options import LoraOptions
from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.checks import all_checks
from glm4ft.testing.specification.routed_experts import NEEDED, too_old
from glm4ft.testing.subjects import own
from glm4ft.testing.trial.plans import NAMED
from glm4ft.testing.trial.runner import run_check
from glm4ft.testing.trial.trial import Trial

CHECKS = {check.name: check for check in all_checks()}
PLANS = {plan.name: plan for plan in NAMED}
ARCHITECTURES = ("Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM")
pytestmark = pytest.mark.skipif(bool(too_old()), reason=f"models with experts need {NEEDED}; found {too_old()}")


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=["glm-4.5", "glm-4.7"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"), architecture=request.param)


@pytest.fixture(scope="module")
def trial(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(own.Subject(str(base)), base, tmp_path_factory.mktemp("trial"))


@pytest.mark.parametrize("name", ["standard", "conversations of every kind", "packed", "checkpointed and packed"])
def test_every_stage_of_a_recorded_run_is_as_specified(trial: Trial, name: str) -> None:
    """Rows with and without reasoning, gradients through routers, packed rows apart, experts recomputed."""
    verdict = trial.run_plan(PLANS[name]).verdict
    assert not verdict.departures, "\n".join(map(str, verdict.departures.values()))
    assert not verdict.hidden


@pytest.mark.parametrize(
    "name",
    [
        "weights_equal_those_of_the_base",
        "adapters_are_on_the_requested_modules",
        "adapters_act_at_the_requested_scale",
        "only_what_was_asked_for_is_trained",
        "base_is_unchanged_by_training",
        "saved_adapter_is_complete",
        "merged_model_equals_the_adapted_model",
    ],
)
def test_a_claim_about_weights_and_adapters_holds(trial: Trial, name: str) -> None:
    result = run_check(CHECKS[name], trial)
    assert result.status == "passed", result.message


# --- what is wrong is red -------------------------------------------------------------------------------------------


def modules(model: Any, ending: str) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(ending)]


class OneExpertLess(own.Subject):
    """A token is given one expert less than in the base."""

    def build_model(self, base_dir: str, seed: int) -> Any:
        model = super().build_model(base_dir, seed)
        for router in modules(model, "mlp.gate"):
            router.top_k -= 1
        return model


class NoSharedExpert(own.Subject):
    """The expert that all tokens share does not act."""

    def build_model(self, base_dir: str, seed: int) -> Any:
        model = super().build_model(base_dir, seed)
        for shared in modules(model, "shared_experts"):
            shared.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        return model


class ExpertsAtTwiceTheScale(own.Subject):
    """The adapters of the experts act at twice the requested scale."""

    def build_model(self, base_dir: str, seed: int) -> Any:
        model = super().build_model(base_dir, seed)
        for layer in model.modules():
            if getattr(layer, "parameter_name", None):
                layer.scaling["default"] *= 2
        return model


class HalfOfTheExperts(own.Subject):
    """The second projection of the experts is left out of the adapter that was asked for."""

    def build_model(self, base_dir: str, seed: int) -> Any:
        asked = self.options
        self.options = LoraOptions(targets=[*self.lora["target_modules"], "experts.gate_up_proj"])
        try:
            return super().build_model(base_dir, seed)
        finally:
            self.options = asked


class WithoutRouterGradient(own.Subject):
    """The weights of the experts are cut from the gradient, as by a router under ``no_grad``."""

    def build_model(self, base_dir: str, seed: int) -> Any:
        model = super().build_model(base_dir, seed)
        for router in modules(model, "mlp.gate"):
            router.register_forward_hook(lambda module, args, output: tuple(part.detach() for part in output))
        return model


@pytest.mark.parametrize(
    ("subject", "name", "words"),
    [
        (OneExpertLess, "first_loss_equals_that_of_the_base", "logits are"),
        (NoSharedExpert, "first_loss_equals_that_of_the_base", "logits are"),
        (ExpertsAtTwiceTheScale, "adapters_act_at_the_requested_scale", r"experts\..*_proj is .* off instead of 2"),
        (HalfOfTheExperts, "adapters_are_on_the_requested_modules", r"experts\.down_proj has no adapter"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_model_is_red(subject: Callable[[str], Any], name: str, words: str, base: Path, tmp_path: Path) -> None:
    result = run_check(CHECKS[name], Trial(subject(str(base)), base, tmp_path))
    assert result.status == "failed"
    assert re.search(words, result.message), result.message


def test_a_gradient_that_does_not_pass_the_router_is_red(base: Path, tmp_path: Path) -> None:
    departures = Trial(WithoutRouterGradient(str(base)), base, tmp_path).run(steps=1).verdict.departures
    assert next(iter(departures)) == "gradient"
