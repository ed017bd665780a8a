"""The limit of a gradient grows with the depth of the base, where rounding adds up; no other limit does.

Run: pytest tests/testing/replay/test_limits.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm4ft.testing.recording.trace import Step
from glm4ft.testing.replay.history import History
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.replay.tolerances import LIMITS, SHALLOW

PLAN = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


@pytest.mark.parametrize(("layers", "factor"), [(2, 1.0), (SHALLOW, 1.0), (30, 30 / SHALLOW)])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_limit_of_the_gradient_in_fp32_is_in_proportion_to_the_layers_of_a_deep_base(
    layers: int, factor: float, dtype: torch.dtype
) -> None:
    reference: Any = SimpleNamespace(num_layers=layers)
    history = History(reference, SimpleNamespace(), PLAN, dtype)  # type: ignore[arg-type]
    step = ReplayedStep(1, Step([], {}, {}, {}, [], "AdamW"), history)
    own = factor if dtype == torch.float32 else 1.0
    assert step.limit("gradient") == pytest.approx(LIMITS[dtype] * own)
    assert step.limit("batches") == step.limit("model") == LIMITS[dtype]
