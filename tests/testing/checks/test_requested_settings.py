"""What the user asked for reaches the model, and a check fails where it does not.

Run: pytest tests/testing/checks/test_requested_settings.py
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from glm4ft.testing.checks import all_checks
from glm4ft.testing.faults.benign_requests import (
    AdapterOnTheEmbedding,
    Bf16Autocast,
    BiasesTrained,
    Dora,
    DropoutRequested,
    ExcludedModules,
    NormsAndEmbeddingsTrained,
)
from glm4ft.testing.faults.randomness import RecomputedDropoutDrawsAnew
from glm4ft.testing.faults.requested_settings import (
    DoraAskedAndPlainLoraBuilt,
    ExcludeModulesIgnored,
    Fp32WhereBf16WasAsked,
    LoraDropoutNeverApplied,
    ModulesToSaveFrozen,
    ModulesToSaveNotSaved,
)
from glm4ft.testing.recording.discovery import decoder_of
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.trial.runner import run_check
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

CHECKS = {check.name: check for check in all_checks()}
DROPOUT, AUTOCAST = "requested_dropout_acts_in_training_alone", "forward_passes_have_the_requested_autocast"
MODULES = "adapters_are_on_the_requested_modules"
SEED, RECOMPUTED = "one_seed_repeats_one_run", "checkpointing_does_not_change_the_gradient"
SCALE = "adapters_act_at_the_requested_scale"
TRAINED, SAVED = "only_what_was_asked_for_is_trained", "saved_adapter_is_complete"


class DropoutAtAnotherRate(DropoutRequested):
    def lora_config(self) -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", **{**self.lora, "lora_dropout": 0.2})


class DropoutInEvaluation(DropoutRequested):
    def evaluating(self, model: Any) -> Any:
        model.train()
        return torch.no_grad()


class AutocastUnasked(Bf16Autocast):
    autocast: Any = None


class HeadRequested(Subject):
    """The head is trained beside the adapters, as was asked for."""

    lora: Mapping[str, Any] = {**Subject.lora, "modules_to_save": ["lm_head"]}


class MagnitudesOfOne(Dora):
    def attach(self, base: Any, seed: int) -> Any:
        model = super().attach(base, seed)
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                torch.nn.init.ones_(parameter)
        return model


class SeedIgnored(Subject):
    """The random numbers of training go on from wherever they are."""

    def begin(self, model: Any, conversations: Any, plan: Any) -> Any:
        with torch.random.fork_rng():  # so that the seed that the loop sets is gone afterwards
            return super().begin(model, conversations, plan)


class BiasTrainedUnasked(Subject):
    def lora_config(self) -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", bias="lora_only", **self.lora)


class NormTrainedUnasked(Subject):
    def lora_config(self) -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", modules_to_save=["norm"], **self.lora)


class BiasesFrozen(BiasesTrained):
    def lora_config(self) -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", **Subject.lora)


CASES = (
    (BiasesFrozen, TRAINED, "bias='lora_only' was asked for, and no bias is trained, as .*k_proj.bias"),
    (BiasTrainedUnasked, TRAINED, r"6 trained parameters belong to no adapter, as \S+k_proj.base_layer.bias"),
    (NormTrainedUnasked, TRAINED, r"trained parameters belong to no adapter, as \S+norm.modules_to_save"),
    (DoraAskedAndPlainLoraBuilt, MODULES, "q_proj has no magnitude, though DoRA was requested"),
    (MagnitudesOfOne, MODULES, "the magnitudes of .*q_proj do not start as the norms of its weight's rows"),
    (ExcludeModulesIgnored, MODULES, r"down_proj was not asked for \(2 like it; 12 adapters for 10\)"),
    (SeedIgnored, SEED, "do not come from the plan's seed"),
    (RecomputedDropoutDrawsAnew, RECOMPUTED, r"with dropout, the gradient with checkpointing is \S+ off that without"),
    (LoraDropoutNeverApplied, DROPOUT, "no dropout layer is in front of an adapter"),
    (DropoutAtAnotherRate, DROPOUT, r"in training, 0\.(19|20)\d\d of .* dropped, not 0\.1"),
    (DropoutInEvaluation, DROPOUT, r"in evaluation, 0\.(09|10)\d\d of .* dropped, not 0"),
    (Fp32WhereBf16WasAsked, AUTOCAST, "run under autocast to None, requested was bfloat16"),
    (AutocastUnasked, AUTOCAST, "run under autocast to bfloat16, requested was None"),
    (ModulesToSaveFrozen, TRAINED, "asks for lm_head, of which no parameter is trained"),
    (ModulesToSaveNotSaved, SAVED, "lm_head.weight is missing, though it was trained"),
)
HEALTHY = (
    (DropoutRequested, DROPOUT), (Bf16Autocast, AUTOCAST), (HeadRequested, TRAINED), (HeadRequested, SAVED),
    (NormsAndEmbeddingsTrained, TRAINED), (BiasesTrained, TRAINED), (AdapterOnTheEmbedding, MODULES),
    (AdapterOnTheEmbedding, SCALE), (Dora, MODULES), (Dora, RECOMPUTED), (Dora, SAVED), (ExcludedModules, MODULES),
    (Subject, SEED), (Subject, RECOMPUTED),
)  # fmt: skip


@pytest.fixture(scope="module")
def trial_on(tmp_path_factory: pytest.TempPathFactory, healthy: Trial) -> Any:
    def make(subject: type[Subject]) -> Trial:
        return Trial(subject(str(healthy.base_dir)), healthy.base_dir, tmp_path_factory.mktemp("trial"))

    return make


@pytest.mark.parametrize(("subject", "check", "says"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_setting_that_does_not_arrive_fails(subject: type[Subject], check: str, says: str, trial_on: Any) -> None:
    with pytest.raises(CheckFailed, match=says):
        CHECKS[check].run(trial_on(subject))


@pytest.mark.parametrize(("subject", "check"), HEALTHY, ids=lambda value: getattr(value, "__name__", None))
def test_setting_that_arrives_passes(subject: type[Subject], check: str, trial_on: Any) -> None:
    with nullcontext():
        CHECKS[check].run(trial_on(subject))


@pytest.mark.parametrize("check", [DROPOUT, AUTOCAST])
def test_nothing_is_judged_that_nobody_asked_for(check: str, healthy: Trial) -> None:
    with pytest.raises(NotApplicable):
        CHECKS[check].run(healthy)


class OtherAdapter(Subject):
    """A parameter beside the LoRA matrices is trained, of which the specification knows nothing."""

    def attach(self, base: Any, seed: int) -> Any:
        model = super().attach(base, seed)
        model.base_model.model.model.scale = torch.nn.Parameter(torch.ones(1))
        return model


class RowsOfTheEmbeddingTrained(Subject):
    lora: Mapping[str, Any] = {**Subject.lora, "trainable_token_indices": [1, 2]}


@pytest.mark.parametrize(
    ("subject", "says"),
    [
        (OtherAdapter, "not judged: base_model.model.model.scale is trained, but is neither a LoRA matrix nor"),
        (RowsOfTheEmbeddingTrained, "trainable_token_indices is not covered by the reference"),
    ],
)
def test_adapter_of_another_kind_is_not_judged(subject: type[Subject], says: str, trial_on: Any) -> None:
    """What needs the specification of the adapter is skipped; that nobody asked for it is told by one check."""
    trial = trial_on(subject)
    result = run_check(CHECKS["gradient_is_that_of_the_token_mean"], trial)
    assert (result.status, result.message[: len(says)]) == ("skipped", says)
    expected = CheckFailed if subject is OtherAdapter else NotApplicable
    with pytest.raises(expected, match=r"1 trained parameters belong to no adapter|is not covered by the reference"):
        CHECKS[TRAINED].run(trial)


def test_final_norm_is_the_copy_that_is_trained(healthy: Trial) -> None:
    """The module that it replaces is kept beside it, and never runs."""
    model = NormsAndEmbeddingsTrained(str(healthy.base_dir)).build_model(str(healthy.base_dir), 0)
    assert decoder_of(model).norm is model.base_model.model.model.norm.modules_to_save["default"]


def test_plain_object_stays_on_its_base_and_is_not_blamed_for_it(healthy: Trial, monkeypatch: Any) -> None:
    """A subject that is no function of its base cannot be made again on another one."""
    trial = Trial(healthy.subject, healthy.base_dir, Path("unused"), "module:instance")
    monkeypatch.setattr("glm4ft.testing.trial.subject_on_base.load_subject", lambda *_: healthy.subject)
    with pytest.raises(NotApplicable, match="plain object"):
        trial.subject_on(healthy.base_dir)
