"""The plans under which a pipeline is recorded, and which check judges each stage of each plan.

A departure of a plan fails at its own stage, in the check that owns the stage there: a check of one kind of run
(packed, accumulated, ...) where there is one, and the check of the whole stage otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# The check of each replayed stage that judges every plan which no other check judges at that stage.
STAGE_OWNERS = {
    "rows": "mask_reaches_the_loss",
    "batches": "every_row_is_seen_once_per_epoch",
    "model": "model_computes_what_was_requested",
    "gradient": "gradient_is_that_of_the_token_mean",
    "clipping": "gradient_is_clipped_to_its_global_norm",
    "schedule": "learning_rate_follows_the_schedule",
    "update": "update_follows_adamw",
}

INTERRUPTIONS = ("eval_every", "save_every")  # what a run does between its steps, which may not change them


@dataclass(frozen=True)
class Plan:
    """A run that is recorded and replayed as a whole.

    Args:
        name: The name that messages show.
        changes: The changes of the standard plan.
        of: The name of the conversations.
        owners: Stages mapped to the check that judges them for this plan, where it is not the stage's own.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    of: str = "short"
    owners: Mapping[str, str] = field(default_factory=dict)

    def owner(self, stage: str) -> str:
        """The check that judges a stage of this plan."""
        return self.owners.get(stage, STAGE_OWNERS[stage])

    def uninterrupted(self) -> Plan | None:
        """The plan without its evaluations and saves; None if it has none."""
        kept = {key: value for key, value in self.changes.items() if key not in INTERRUPTIONS or not value}
        return replace(self, name=f"{self.name}, uninterrupted", changes=kept) if kept != self.changes else None

    def __str__(self) -> str:
        changes = ", ".join(f"{key}={value}" for key, value in self.changes.items())
        return f"{self.name}: {changes}" if changes else self.name


_PACKED = {"batches": "packed_rows_are_isolated_and_whole"}
_ACCUMULATED = {"gradient": "accumulation_does_not_change_the_gradient"}
_CHECKPOINTED = {"gradient": "checkpointing_does_not_change_the_gradient"}
_HORIZON = {"schedule": "schedule_horizon_counts_optimizer_steps"}
_SMALL_UPDATES = {"update": "small_updates_are_not_lost"}
_SILENT_ROWS = {"gradient": "rows_without_targets_do_not_count"}

UNCLIPPED, COMBINATION = "without clipping", "combined settings"
SMALL_NORM, LARGE_NORM = 0.05, 1000.0  # every gradient norm here exceeds the first limit, none the second

NAMED = (
    Plan("standard"),
    Plan("conversations of every kind", {"steps": 4, "micro_batch_size": 1}, of="mixed"),
    Plan("a row of two thousand tokens", {"micro_batch_size": 1, "steps": 2}, of="long"),
    Plan("half of the rows without targets", {"accumulation": 8, "micro_batch_size": 1, "steps": 2}, "half-silent",
         _SILENT_ROWS),
    Plan("larger batches", {"micro_batch_size": 4, "steps": 2}),
    Plan("batches that do not divide the rows", {"micro_batch_size": 3, "steps": 6}),
    Plan("windows that do not divide the rows", {"micro_batch_size": 1, "accumulation": 3, "steps": 6}, "short",
         _ACCUMULATED),
    Plan("packed", {"packing": True, "micro_batch_size": 1}, "short", _PACKED),
    Plan("accumulated", {"accumulation": 2, "schedule": "linear", "steps": 4}, "short", {**_ACCUMULATED, **_HORIZON}),
    Plan("accumulated row by row", {"accumulation": 4, "micro_batch_size": 1, "steps": 4}, "short", _ACCUMULATED),
    Plan("checkpointed", {"gradient_checkpointing": True, "steps": 2}, "short", _CHECKPOINTED),
    Plan("checkpointed and packed", {"gradient_checkpointing": True, "packing": True, "micro_batch_size": 1,
         "steps": 2}, "short", {**_CHECKPOINTED, **_PACKED}),
    Plan("clipped", {"max_grad_norm": SMALL_NORM, "steps": 4}),
    Plan("below the clipping limit", {"max_grad_norm": LARGE_NORM, "steps": 4}),
    Plan(UNCLIPPED, {"max_grad_norm": 0, "steps": 4}),
    Plan("warmed up, then linear", {"schedule": "linear", "warmup_steps": 2, "steps": 6}),
    Plan("warmed up, then cosine", {"schedule": "cosine", "warmup_steps": 2, "steps": 6}),
    Plan("warmed up and accumulated", {"schedule": "constant", "accumulation": 2, "warmup_steps": 2, "steps": 6}),
    Plan("other settings of AdamW", {"weight_decay": 0.1, "betas": [0.8, 0.99], "eps": 1e-6, "steps": 4}),
    Plan("small learning rate", {"learning_rate": 1e-6, "steps": 4}, "short", _SMALL_UPDATES),
    Plan("packed and evaluated", {"steps": 4, "packing": True, "micro_batch_size": 1, "eval_every": 2}, "short",
         _PACKED),
    Plan("accumulated and evaluated", {"accumulation": 2, "schedule": "linear", "steps": 4, "eval_every": 2}, "short",
         _ACCUMULATED),
)  # fmt: skip

# Together these contain every pair of two settings' values (a test counts them), so that a fault which needs two
# settings at once has a plan that shows it. Found by a greedy search over random plans with at most three packs a step.
_SETTINGS = (
    "packing", "micro_batch_size", "accumulation", "gradient_checkpointing", "max_grad_norm", "schedule",
    "warmup_steps", "weight_decay", "eval_every", "save_every",
)  # fmt: skip
_COMBINATIONS: tuple[tuple[Any, ...], ...] = (
    (True, 1, 1, False, 0.05, "cosine", 2, 0.1, 2, 0),
    (False, 2, 3, True, 0, "cosine", 0, 0.0, 0, 2),
    (True, 3, 1, False, 1.0, "constant", 2, 0.0, 0, 2),
    (False, 3, 2, True, 1.0, "linear", 0, 0.1, 2, 0),
    (True, 1, 2, True, 0, "constant", 2, 0.0, 2, 0),
    (False, 1, 2, False, 0.05, "linear", 0, 0.0, 0, 2),
    (True, 2, 1, False, 0, "linear", 0, 0.1, 0, 0),
    (False, 2, 3, True, 0.05, "constant", 2, 0.1, 2, 2),
    (True, 1, 3, False, 1.0, "linear", 2, 0.1, 2, 0),
    (False, 3, 1, True, 0, "cosine", 0, 0.1, 0, 0),
    (False, 3, 3, True, 0.05, "constant", 0, 0.1, 0, 0),
    (False, 2, 2, False, 1.0, "cosine", 0, 0.1, 2, 2),
)
COMBINED = tuple(
    Plan(COMBINATION, {"steps": 3, **dict(zip(_SETTINGS, values, strict=True))}) for values in _COMBINATIONS
)

PLANS = (*NAMED, *COMBINED)


def plans_of(check: str, stage: str) -> Iterator[Plan]:
    """The plans that a check judges at a stage.

    Args:
        check: The name of the check.
        stage: A stage that the replay judges.
    """
    return (plan for plan in PLANS if plan.owner(stage) == check)
