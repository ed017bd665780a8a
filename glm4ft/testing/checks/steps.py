"""Checks of single optimiser steps: a recorded run against the executable specification."""

from __future__ import annotations

from glm4ft.testing.checks.registry import NotApplicable, check
from glm4ft.testing.checks.trial import Trial

NEEDS = ("build_model", "train")


@check(stage="rows", needs=NEEDS, incident="nanochat lost a correct renderer's mask in its loader for a month")
def check_mask_reaches_the_loss(trial: Trial) -> None:
    """The labels that the gradient shows are those that ``encode`` gave."""
    trial.require_stage("rows")


@check(stage="batches", needs=NEEDS, incident="accelerate 4071: the data order starts again; ms-swift 9902")
def check_every_row_is_seen_once_per_epoch(trial: Trial) -> None:
    """No row comes twice before all have come once, and none sees its neighbours in a padded batch."""
    trial.require_stage("batches")


@check(stage="batches", needs=NEEDS, incident="transformers 46634: an all-ones mask switches the isolation off")
def check_packed_rows_are_isolated(trial: Trial) -> None:
    """What a packed row computes is what it computes alone."""
    trial.require_stage("batches", packing=True, micro_batch_size=1)
    if not trial.replayed(packing=True, micro_batch_size=1).packed:
        raise NotApplicable("asked to pack, the trainer did not")


@check(stage="model", needs=NEEDS, incident="mlx-lm 1698: all of each head rotated; PEFT 2489: scale left out")
def check_model_is_the_base_with_adapters_at_rest(trial: Trial) -> None:
    """The adapters start as the identity, at the stated scale, on the base as it lies on the disk."""
    trial.require_stage("model")


@check(stage="gradient", needs=NEEDS, incident="transformers 34191, TRL 6668")
def check_gradient_is_that_of_the_token_mean(trial: Trial) -> None:
    """One micro-batch per step."""
    trial.require_stage("gradient")


@check(stage="gradient", needs=NEEDS, incident="transformers 34191, axolotl 1980: mean of micro-batch means")
def check_accumulation_does_not_change_the_gradient(trial: Trial) -> None:
    """Every token of a step counts the same, in however many micro-batches it comes."""
    trial.require_stage("gradient", accumulation=2)
    trial.require_stage("gradient", accumulation=4, micro_batch_size=1)


@check(stage="clipping", needs=NEEDS, incident="DeepSpeed 5150: coefficient inverted; aprender 2112: no effect")
def check_gradient_is_clipped_to_its_global_norm(trial: Trial) -> None:
    """Above the limit it is scaled down to it, below it stays, and 0 switches clipping off."""
    trial.require_stage("clipping", max_grad_norm=0.05)
    trial.require_stage("clipping", max_grad_norm=0)


@check(stage="schedule", needs=NEEDS, incident="transformers 24088: steps times world size; axolotl 2535")
def check_rate_follows_the_schedule(trial: Trial) -> None:
    """Warm-up from zero, then the shape that was asked for, to the end of the run."""
    for schedule in ("constant", "linear", "cosine"):
        trial.require_stage("schedule", schedule=schedule, warmup_steps=2)


@check(stage="update", needs=NEEDS, incident="accelerate 2665: parameters not in the optimiser; OpenRLHF 1253")
def check_update_is_that_of_adamw(trial: Trial) -> None:
    """Betas, epsilon and decoupled weight decay are those of the plan, on every trained matrix."""
    trial.require_stage("update")
    trial.require_stage("update", weight_decay=0.1, betas=[0.8, 0.99])
