"""Faults by which evaluating or saving changes the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from glm4ft.testing.faults.registry import faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject

ESCAPES = "Changes by a tracker, a callback or a second evaluation set are not seen: the suite runs without them."

fault = faults_at("side-effects")


@fault("eval-mode-not-restored", evidence="shubhamagarwal92/mmd 14; seq2seq 38", cause=r"mode|training")
class EvalModeNotRestored(Subject):
    """After an evaluation the model stays in eval mode, so dropout is off from then on."""

    @contextmanager
    def evaluating(self, model: Any) -> Iterator[None]:
        model.eval()
        with torch.no_grad():
            yield


@fault("eval-in-train-mode", evidence="torchtune 1049; TRL 3337", cause=r"mode|dropout")
class EvalInTrainMode(Subject):
    """The evaluation runs in training mode, with dropout."""

    @contextmanager
    def evaluating(self, model: Any) -> Iterator[None]:
        with torch.no_grad():
            yield


@fault(
    "evaluation-spends-random-numbers",
    evidence="transformers 5.23, measured: the loader of an evaluation draws its seed from the global generator",
    cause=r"random|dropout",
)
class EvaluationSpendsRandomNumbers(Subject):
    """An evaluation draws random numbers from the generator that dropout uses in training."""

    def evaluate_in_training(self, run: LoopState) -> dict[str, float]:
        torch.empty((), dtype=torch.int64).random_()
        return super().evaluate_in_training(run)


@fault(
    "saving-freezes-training",
    evidence="ms-swift 9452",
    cause=r"sav|requires_grad|frozen",
    because="the files are right; what is wrong is that saving changes the run, which is what this stage is about",
)
class SavingFreezesTraining(Subject):
    """Saving sets ``requires_grad`` to false on the adapter that is being trained."""

    def save(self, model: Any, folder: str) -> None:
        super().save(model, folder)
        model.requires_grad_(False)
        model.enable_input_require_grads()  # as for checkpointing; without it the next backward pass would fail loudly
