"""Faults of numbers that are not finite: a NaN or an infinity occurs, and the run goes on as if it had not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.faults.clipping import norm_of
from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import Conversations, LoopState, Subject, trained
from glm4ft.testing.subjects.plain_loop_data import Batch, Features

ESCAPES = (
    "Numbers are made not finite at one place, the final norm; a pipeline that hides only those of another origin "
    "(the optimizer's moments, a reduction over processes) is not seen."
)
NOT_FINITE = r"not finite|infinite|NaN"

side_effects_fault = faults_at("side-effects")
update_fault = faults_at("update")


def is_finite(run: LoopState) -> bool:
    """Whether the gradient of every trained parameter is finite."""
    return all(bool(p.grad.isfinite().all()) for p in trained(run.model) if p.grad is not None)


@side_effects_fault("nan-step-skipped-in-silence", evidence=MADE_UP, cause=NOT_FINITE)
class NanStepSkippedInSilence(Subject):
    """A step whose gradient is not finite is skipped, and the log repeats the figures of the step before."""

    logged = (0.0, 0.0)  # loss and gradient norm of the last step that was taken
    is_skipped = False

    def update(self, run: LoopState) -> None:
        self.is_skipped = not is_finite(run)
        if not self.is_skipped:
            super().update(run)

    def log_entry(self, run: LoopState, loss: float, grad_norm: float) -> dict[str, Any]:
        if not self.is_skipped:
            self.logged = loss, grad_norm
        return super().log_entry(run, *self.logged)


@side_effects_fault("nan-loss-and-gradient-made-zero", evidence="fairchem 441", cause=NOT_FINITE)
class NanLossAndGradientMadeZero(Subject):
    """NaN in loss and gradient is replaced by 0, and the step is taken with what is left."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nan_to_num(super().loss_sum(logits, labels), 0.0, 0.0, 0.0)

    def clip(self, run: LoopState) -> float:
        for parameter in trained(run.model):
            if parameter.grad is not None:
                parameter.grad = torch.nan_to_num(parameter.grad, 0.0, 0.0, 0.0)
        return super().clip(run)


@side_effects_fault("nan-logged-as-zero", evidence="xtuner 625", cause=NOT_FINITE)
class NanLoggedAsZero(Subject):
    """A loss that is NaN is logged as 0, while the optimizer takes the step."""

    def log_entry(self, run: LoopState, loss: float, grad_norm: float) -> dict[str, Any]:
        return super().log_entry(run, *(figure if math.isfinite(figure) else 0.0 for figure in (loss, grad_norm)))


@side_effects_fault("nan-log-keeps-the-mean", evidence="transformers 13619; TRL 6702", cause=NOT_FINITE)
class NanLogKeepsTheMean(Subject):
    """A loss that is not finite is replaced in the log by the mean of earlier losses, while the step is taken."""

    def begin(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> LoopState:
        self.losses: list[float] = []
        return super().begin(model, conversations, plan)

    def log_entry(self, run: LoopState, loss: float, grad_norm: float) -> dict[str, Any]:
        if math.isfinite(loss):
            self.losses.append(loss)
        else:
            loss = sum(self.losses) / max(1, len(self.losses))
        entry = super().log_entry(run, loss, grad_norm)
        return {name: figure for name, figure in entry.items() if name != "grad_norm"}


@side_effects_fault("evaluation-drops-nan-batches", evidence=MADE_UP, cause=NOT_FINITE)
class EvaluationDropsNanBatches(Subject):
    """An evaluation leaves out batches whose loss is not finite, so its mean looks healthy."""

    def score(self, model: Any, rows: Sequence[Features]) -> dict[str, float]:
        loss, hits, num_targets = 0.0, 0, 0
        for batch in self.eval_batches(rows):
            logits = self.forward(model, batch)
            part = float(self.loss_sum(logits, batch["labels"]))
            if math.isfinite(part):
                loss, hits = loss + part, hits + self.count_hits(logits, batch["labels"])
                num_targets += int((batch["labels"][:, 1:] != IGNORED).sum())
        return {"loss": loss / max(1, num_targets), "accuracy": hits / max(1, num_targets)}


@side_effects_fault("nonfinite-norm-logged-as-zero", evidence="pytorch 46849, 53843, 55169", cause=NOT_FINITE)
class NonfiniteNormLoggedAsZero(Subject):
    """If the gradient norm is not finite, clipping is left out and the norm is logged as 0."""

    def clip(self, run: LoopState) -> float:
        return super().clip(run) if math.isfinite(norm_of(run)) else 0.0


@side_effects_fault("infinite-norm-zeroes-the-gradient", evidence="pytorch 46849", cause=NOT_FINITE)
class InfiniteNormZeroesTheGradient(Subject):
    """An infinite gradient norm makes the clipping factor 0, so the step is taken with the old moments alone."""

    def clip(self, run: LoopState) -> float:
        if math.isfinite(norm_of(run)):
            return super().clip(run)
        for parameter in trained(run.model):
            if parameter.grad is not None:
                parameter.grad = torch.zeros_like(parameter.grad)
        return 0.0


@side_effects_fault("nan-steps-left-out-of-the-log", evidence="epfLLM/Megatron-LLM 33", cause=NOT_FINITE)
class NanStepsLeftOutOfTheLog(Subject):
    """Steps are taken with a gradient of NaN, and the log leaves them out."""

    def train(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        log = super().train(model, conversations, plan)
        return [entry for entry in log if math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])]


@update_fault(
    "silent-row-costs-the-whole-step", evidence=MADE_UP, cause=r"NaN|not finite|no target|no \w+ step|lost|skipped"
)
class SilentRowCostsTheWholeStep(Subject):
    """The mean over a micro-batch without targets is NaN, and the whole step that holds it is silently skipped."""

    is_broken = False
    logged = 0.0

    def train_step(self, run: LoopState, batches: list[Batch]) -> dict[str, Any]:
        self.is_broken = False
        return super().train_step(run, batches)

    def train_micro_batch(self, run: LoopState, batch: Batch, num_targets: int, num_micro_batches: int) -> torch.Tensor:
        num_own = self.count_targets([batch])
        mean = self.loss_sum(self.forward(run.wrapped, batch), batch["labels"]) / torch.tensor(num_own)
        self.is_broken = self.is_broken or not bool(mean.isfinite())
        self.backward(mean * (num_own / num_targets))
        return mean.detach() * (num_own / num_targets)

    def update(self, run: LoopState) -> None:
        if not self.is_broken:
            super().update(run)

    def log_entry(self, run: LoopState, loss: float, grad_norm: float) -> dict[str, Any]:
        self.logged = loss if math.isfinite(loss) else self.logged
        return super().log_entry(run, self.logged, grad_norm)
