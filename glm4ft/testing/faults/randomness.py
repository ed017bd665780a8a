"""Faults of random numbers: dropout that acts at the wrong time, and draws that the seed does not determine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import Conversations, LoopState, Subject

ESCAPES = (
    "Random numbers of a GPU's generator, and of data augmentation in the workers of a loader, are not drawn in a run "
    "on a CPU and so are not seen."
)

model_fault = faults_at("model")
gradient_fault = faults_at("gradient")
side_effects_fault = faults_at("side-effects")


def random_seed() -> int:
    """A seed that no plan determines."""
    return int.from_bytes(os.urandom(4), "little")


@model_fault("adapters-ignore-the-seed", evidence=MADE_UP, cause=r"seed")
class AdaptersIgnoreTheSeed(Subject):
    """The adapters are always drawn from the seed 42, while the data are shuffled with the configured seed."""

    def build_model(self, base_dir: str, seed: int) -> Any:
        return super().build_model(base_dir, 42)


@model_fault("adapters-not-repeatable", evidence=MADE_UP, cause=r"seed|repeat|differ")
class AdaptersNotRepeatable(Subject):
    """The adapters are drawn from a seed that changes with every run, so that no run can be repeated."""

    def build_model(self, base_dir: str, seed: int) -> Any:
        return super().build_model(base_dir, random_seed())


@gradient_fault(
    "recomputed-dropout-draws-anew",
    evidence="OLMo-core 828; OLMo 702; unsloth 10744",
    cause=r"recomput|checkpointing|dropout|random",
)
class RecomputedDropoutDrawsAnew(Subject):
    """Gradient checkpointing does not restore the random state, so recomputed layers drop other entries."""

    lora: Mapping[str, Any] = {**Subject.lora, "lora_dropout": 0.1}

    def begin(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> LoopState:
        run = super().begin(model, conversations, plan)
        if plan["gradient_checkpointing"]:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        return run


@side_effects_fault("training-dropout-not-seeded", evidence=MADE_UP, cause=r"seed|repeat|random|differ")
class TrainingDropoutNotSeeded(Subject):
    """The random numbers of training are not seeded, so no two runs with dropout are the same."""

    def begin(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> LoopState:
        run = super().begin(model, conversations, plan)
        if not plan["resume_from"]:
            torch.manual_seed(random_seed())
        return run


@side_effects_fault("generates-in-training-mode", evidence=MADE_UP, cause=r"\bmode\b|dropout")
class GeneratesInTrainingMode(Subject):
    """Text is generated in training mode, with dropout, and the mode is as it was afterwards."""

    def generate(self, model: Any, messages: Sequence[Mapping[str, Any]], tools: Any, max_new_tokens: int) -> list[int]:
        was_training, prompt = model.training, self.prompt(messages, tools)
        model.train()
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + max_new_tokens and not (len(ids) > len(prompt) and ids[-1] in self.stop_ids):
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        model.train(was_training)
        return ids[len(prompt) :]


@side_effects_fault(
    "save-tries-the-model-in-training-mode", evidence=MADE_UP, cause=r"training mode|random|dropout|sav"
)
class SaveTriesTheModelInTrainingMode(Subject):
    """Saving runs the model once in training mode, as tracing for an export does, which draws random numbers."""

    def save(self, model: Any, folder: str) -> None:
        was_training = model.training
        model.train()
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        model.train(was_training)
        super().save(model, folder)
