"""Faults of the loss itself: it is not the cross entropy of the logits, or gives tokens weights of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import Subject

ESCAPES = "A loss with several numbers of its own (a distillation, a margin) is caught, but not named."
SMOOTHING, PENALTY, TEMPERATURE, CAP = 0.05, 1e-3, 0.7, 10.0

fault = faults_at("gradient")


@fault("label-smoothing-unasked", evidence=MADE_UP, cause=r"label smoothing of 0\.05")
class LabelSmoothingUnasked(Subject):
    """Labels are smoothed, as when the default of a vision trainer is carried over."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        predictions, targets = self.shift(logits, labels)
        return F.cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=SMOOTHING)


@fault("penalty-on-the-logits", evidence=MADE_UP, cause=r"a penalty of 0\.001 .* is added")
class PenaltyOnTheLogits(Subject):
    """The loss has a penalty on the size of the logits, as in pretraining, that nobody asked for."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        predictions, targets = self.shift(logits, labels)
        sizes = torch.logsumexp(predictions[targets != IGNORED].float(), dim=-1)
        return super().loss_sum(logits, labels) + PENALTY * (sizes * sizes).sum()


@fault("temperature-in-the-loss", evidence="tinker-cloud 26; unsloth 11277", cause=r"divided by 0\.7\b")
class TemperatureInTheLoss(Subject):
    """Training divides the logits by the temperature that is meant for sampling."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss_sum(logits / TEMPERATURE, labels)


@fault("logits-capped", evidence=MADE_UP, cause=r"capped at 10\b")
class LogitsCapped(Subject):
    """Logits are capped as for Gemma 2, whose head is trained for it, in front of the loss of any model."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss_sum(CAP * (logits / CAP).tanh(), labels)


@fault("softmax-twice", evidence="Transformer-GCN-QA 32", cause=r"softmax is applied before")
class SoftmaxTwice(Subject):
    """The loss gets probabilities where it expects logits, and applies softmax to them once more."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss_sum(logits.softmax(-1), labels)


@fault("first-token-of-answers-counts-twice", evidence=MADE_UP, cause=r"weights that were not asked for")
class FirstTokenOfAnswersCountsTwice(Subject):
    """The first supervised token of every answer counts twice."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        predictions, targets = self.shift(logits, labels)
        is_target = targets != IGNORED
        begins = is_target & ~torch.cat([is_target[:1], is_target[:-1]])
        first = F.cross_entropy(predictions, targets.where(begins, IGNORED), ignore_index=IGNORED, reduction="sum")
        return super().loss_sum(logits, labels) + first
