"""What a trial does otherwise on a base that is not tiny: it learns slowly, and keeps no model that it can do without.

A recorded run keeps its model; the forty runs of the suite would keep forty copies of the base. It also keeps the
gradients and parameters of its steps, which are on the disk here: of SmolLM2's adapters, 10 MB each, three for a step.
Plans that combine settings are left out: what they show does not depend on the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4ft.model.checkpoint import TINY_GLM4_IDS
from glm4ft.testing.trial.plans import COMBINATION
from glm4ft.testing.trial.trial import Trial

HEAVY_BYTES = 1e8  # of weights; the built-in base has 2 MB
# The learning rate and the steps of the overfit run. A learning rate of 1e-3 memorises the two conversations in 37
# steps at hidden size 512 with 8 layers (random:glm-4-9b-0414 scaled down, x86-64 CPU, 2026-11-25); at the true size of
# GLM-4 this is not measured yet.
PLAN: Mapping[str, Any] = {"learning_rate": 1e-3}
OVERFIT_STEPS = 150


def is_heavy(base_dir: Path) -> bool:
    """Whether the weights of a base take more than ``HEAVY_BYTES``.

    Args:
        base_dir: The folder of the base.
    """
    return sum(file.stat().st_size for file in base_dir.glob("*.safetensors")) > HEAVY_BYTES


def spare(trial: Trial) -> None:
    """Have a trial release its models and record on the disk; on a pretrained base also learn more slowly.

    There combined plans are left out, too.

    Args:
        trial: The trial, before its first run.
    """
    trial.keeps_models = False
    if trial.base != TINY_GLM4_IDS:
        trial.standard, trial.overfit_steps, trial.left_out = PLAN, OVERFIT_STEPS, frozenset({COMBINATION})
