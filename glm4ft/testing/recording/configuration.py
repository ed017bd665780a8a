"""Reads what a run's own configuration states, from the trainer that is training: its options, not what it does.

The first forward pass is called by the trainer, so the trainer and its options are among the local variables of the
functions that are under way. Nothing is imported: a class is recognised by its name and module.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from types import FrameType
from typing import Any

# The options of transformers' TrainingArguments, and of TRL's and LLaMA-Factory's on top of it, that can be compared
# with a recording; under those names they are recorded.
OPTIONS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_grad_norm",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "gradient_accumulation_steps",
    "per_device_train_batch_size", "max_steps", "num_train_epochs", "bf16", "fp16", "world_size", "seed", "packing",
    "label_smoothing_factor", "neftune_noise_alpha", "gradient_checkpointing",
)  # fmt: skip


def stated_configuration(frame: FrameType | None) -> dict[str, Any]:
    """The options of the trainer that is training.

    Args:
        frame: The frame to begin at; its callers are searched in turn.
    Returns:
        The options by transformers' names; ``trainer``, the name of its class, "" where a loop of one's own holds the
        options; ``total_steps``, the length of the schedule, and ``resumed_at``, the steps that an earlier run took,
        where they are known. Empty if there is no known trainer.
    """
    alone: Any = None  # options without a trainer, as a loop of one's own holds them
    for value in local_values(frame):
        if _is(value, "Trainer", "transformers.trainer"):
            state: Any = getattr(value, "state", None)
            found = _options(value.args, int(getattr(state, "max_steps", 0) or 0))
            return {"trainer": type(value).__name__, "resumed_at": int(getattr(state, "global_step", 0)), **found}
        if _is(value, "Trainer", "lightning.pytorch.trainer.trainer", "pytorch_lightning.trainer.trainer"):
            return {"trainer": type(value).__name__, **_lightning_options(value)}
        if alone is None and _is(value, "TrainingArguments", "transformers.training_args"):
            alone = value
    return {} if alone is None else {"trainer": "", **_options(alone, int(alone.max_steps or 0))}


def local_values(frame: FrameType | None) -> Iterator[Any]:
    """The values of the local variables of a frame and of its callers, the innermost first."""
    while frame is not None:
        yield from list(frame.f_locals.values())
        frame = frame.f_back


def _is(value: Any, name: str, *modules: str) -> bool:
    return any(kind.__name__ == name and kind.__module__ in modules for kind in type(value).__mro__)


def _options(arguments: Any, total_steps: int) -> dict[str, Any]:
    found = {name: _plain(getattr(arguments, name)) for name in OPTIONS if hasattr(arguments, name)}
    if total_steps > 0:
        found["total_steps"] = total_steps
        if hasattr(arguments, "get_warmup_steps"):  # it may be stated as a share of all steps
            found["warmup_steps"] = arguments.get_warmup_steps(total_steps)
    return {name: value for name, value in found.items() if value is not None}


def _lightning_options(trainer: Any) -> dict[str, Any]:
    clip = getattr(trainer, "gradient_clip_val", None)
    is_by_norm = str(getattr(trainer, "gradient_clip_algorithm", None) or "norm").endswith("norm")
    found = {
        "gradient_accumulation_steps": getattr(trainer, "accumulate_grad_batches", None),
        "world_size": getattr(trainer, "world_size", None),
        "max_grad_norm": float(clip or 0.0) if is_by_norm else None,
        "bf16": "bf16" in str(getattr(trainer, "precision", "")),
        "fp16": str(getattr(trainer, "precision", "")).startswith("16"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    """The value as JSON can represent it; None for what it cannot."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return value if isinstance(value, (bool, int, float, str)) else None
