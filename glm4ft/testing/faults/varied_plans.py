"""Faults of single settings: the standard plan is right, and one with packing, a warm-up or the like is not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.faults.clipping import norm_of
from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import Conversations, LoopState, Subject
from glm4ft.testing.subjects.plain_loop_data import Batch, Features

ESCAPES = (
    "A fault that three settings must have particular values to show is seen only if one recorded plan combines them, "
    "and one that needs a larger batch or a longer run than the plans have is not seen."
)

batches_fault = faults_at("batches")
model_fault = faults_at("model")
gradient_fault = faults_at("gradient")
clipping_fault = faults_at("clipping")
schedule_fault = faults_at("schedule")
update_fault = faults_at("update")
side_effects_fault = faults_at("side-effects")


@model_fault(
    "checkpointing-kills-adapters",
    evidence="open-unlearning 178; microsoft/LoRA 120",
    cause=r"no gradient|never moved|dead|checkpointing",
)
class CheckpointingKillsAdapters(Subject):
    """Reentrant checkpointing without gradients at the embeddings leaves only the head's adapter with a gradient."""

    lora: Mapping[str, Any] = {**Subject.lora, "target_modules": [*Subject.lora["target_modules"], "lm_head"]}

    def begin(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> LoopState:
        run = super().begin(model, conversations, plan)
        if plan["gradient_checkpointing"]:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            hooks = model.get_input_embeddings()._forward_hooks  # where transformers puts the hook that prevents this
            for number in [n for n, hook in hooks.items() if "make_inputs_require_grads" in hook.__qualname__]:
                del hooks[number]
        return run


@batches_fault(
    "packed-tail-lost-when-accumulating", evidence=MADE_UP, cause=r"never seen|not seen|lost|another 0 times"
)
class PackedTailLostWhenAccumulating(Subject):
    """With packing, packs that do not fill a whole accumulation window are dropped in every epoch."""

    pack_length = 2
    window = 1  # packs of an optimizer step

    def begin(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> LoopState:
        self.window = plan["accumulation"] * plan["micro_batch_size"]
        return super().begin(model, conversations, plan)

    def items(self, rows: Sequence[Features], packing: bool) -> list[list[Features]]:
        items = super().items(rows, packing)
        kept = len(items) // self.window * self.window if packing else len(items)
        return items[: kept or None]


@gradient_fault("labels-shifted-in-uneven-batches", evidence=MADE_UP, cause=r"shifted twice|token after next")
class LabelsShiftedInUnevenBatches(Subject):
    """Where the batch size does not divide the rows, another collator is used, which shifts the labels already."""

    def batches(self, run: LoopState) -> Iterator[Batch]:
        is_uneven = len(run.rows) % run.plan["micro_batch_size"] != 0
        for batch in super().batches(run):
            labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) if is_uneven else batch["labels"]
            yield {**batch, "labels": labels}


@update_fault("decay-only-with-warm-up", evidence=MADE_UP, cause=r"weight_decay|decay")
class DecayOnlyWithWarmUp(Subject):
    """With a warm-up, the parameter groups are rebuilt with the weight decay that AdamW has by default."""

    def set_rate(self, run: LoopState) -> None:
        super().set_rate(run)
        if run.plan["warmup_steps"]:
            for group in run.optimizer.param_groups:
                group["weight_decay"] = 0.01


@clipping_fault("clipping-off-when-accumulating", evidence=MADE_UP, cause=r"not clipped")
class ClippingOffWhenAccumulating(Subject):
    """Clipping waits for a flag of the accumulation that is never set if a step has several micro-batches."""

    def clip(self, run: LoopState) -> float:
        return norm_of(run) if run.plan["accumulation"] > 1 else super().clip(run)


@schedule_fault("another-rate-when-packing", evidence=MADE_UP, cause=r"times the requested")
class AnotherRateWhenPacking(Subject):
    """With packing, the learning rate is multiplied by the square root of the rows in a pack, unrequested."""

    def set_rate(self, run: LoopState) -> None:
        super().set_rate(run)
        if run.plan["packing"]:
            num_packs = len(self.items(run.rows, True))
            for group in run.optimizer.param_groups:
                group["lr"] *= math.sqrt(len(run.rows) / num_packs)


@schedule_fault(
    "schedule-steps-per-micro-batch-in-warm-up",
    evidence="starVLA 210; accelerate 963; SpecForge 364; h2o-llmstudio 663",
    cause=r"micro-batch|2 times|times per update|per step",
)
class ScheduleStepsPerMicroBatchInWarmUp(Subject):
    """The schedule advances with every micro-batch instead of every optimizer step, so the warm-up ends too early."""

    def rate_factor(self, step: int, plan: Mapping[str, Any]) -> float:
        return super().rate_factor(min(step * plan["accumulation"], plan["steps"]), plan)


@batches_fault("padding-trained-in-odd-batches", evidence=MADE_UP, cause=r"padding|outside of rows")
class PaddingTrainedInOddBatches(Subject):
    """Batches with an odd number of rows take a path that pads labels with the pad id."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        if len(rows) > 1 and len(rows) % 2:
            batch["labels"] = self.pad([row["labels"] for row in rows], self.pad_id)
        return batch

    def eval_batches(self, rows: Sequence[Features]) -> Iterator[Batch]:
        return (self.collate([row]) for row in rows)


@side_effects_fault(
    "update-skipped-after-evaluation-when-accumulating", evidence=MADE_UP, cause=r"steps follow|evaluat"
)
class UpdateSkippedAfterEvaluationWhenAccumulating(Subject):
    """An evaluation resets the count of micro-batches, and the next update is skipped if a step has several of them."""

    def update(self, run: LoopState) -> None:
        every = run.plan["eval_every"]
        if not (every and run.step and run.step % every == 0 and run.plan["accumulation"] > 1):
            super().update(run)


@gradient_fault("gradient-cleared-when-checkpointing-and-accumulating", evidence=MADE_UP, cause=r"micro-batch")
class GradientClearedWhenCheckpointingAndAccumulating(Subject):
    """With gradient checkpointing, every micro-batch clears the gradient that earlier ones of the step added."""

    def train_micro_batch(self, run: LoopState, batch: Batch, num_targets: int, num_micro_batches: int) -> torch.Tensor:
        if run.plan["gradient_checkpointing"]:
            self.zero_grad(run)
        return super().train_micro_batch(run, batch, num_targets, num_micro_batches)


@update_fault("another-beta-with-cosine", evidence=MADE_UP, cause=r"betas")
class AnotherBetaWithCosine(Subject):
    """A preset for the cosine schedule has a second beta of its own, which overwrites the configured one."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        if plan["schedule"] == "cosine":
            plan = {**plan, "betas": (plan["betas"][0], 0.95)}
        return super().make_optimizer(model, plan)


@batches_fault(
    "isolation-lost-with-two-packs-a-batch", evidence=MADE_UP, cause=r"attended|neighbour|lets it see|position"
)
class IsolationLostWithTwoPacksABatch(Subject):
    """The packs of a batch are joined to one sequence whose positions restart at packs, not at the rows inside them."""

    pack_length = 2

    def batch(self, items: Any, packing: bool) -> Batch:
        packs = list(items)
        batch = super().batch(packs, packing)
        if packing and len(packs) > 1:
            lengths = [sum(len(row["input_ids"]) for row in pack) for pack in packs]
            batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        return batch
