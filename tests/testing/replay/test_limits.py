"""The limit of a gradient grows with the depth of the base, and in low precision with the rounding of the step itself.

Run: pytest tests/testing/replay/test_limits.py
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm4ft.testing.faults.benign_requests import Bf16Autocast
from glm4ft.testing.recording.trace import Step
from glm4ft.testing.replay.history import History
from glm4ft.testing.replay.replay import replay
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.replay.tolerances import LIMITS, SHALLOW
from glm4ft.testing.trial.trial import Trial

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


def test_rounding_of_a_step_is_measured_where_that_of_the_run_is_too_narrow(healthy: Trial, tmp_path: Path) -> None:
    """A limit of the whole run may be too narrow for one step; what is larger than the step's own rounding departs."""
    trial = Trial(Bf16Autocast(str(healthy.base_dir)), healthy.base_dir, tmp_path)
    run = trial.run(steps=4)
    assert not run.verdict.departures
    assert 0 < run.measured_limits["gradient"] < 0.1
    narrow = {**run.measured_limits, "gradient": 1e-6}
    assert not replay(run.trace, run.reference, run.rows, run.plan, limits=narrow).departures
    step = run.trace.steps[2]
    step.raw = {name: 1.3 * gradient if "lora_B" in name else gradient for name, gradient in step.raw.items()}
    found = replay(run.trace, run.reference, run.rows, run.plan, limits=narrow).departures["gradient"]
    assert found.step == 3
    assert found.size is not None
    assert found.size > run.measured_limits["gradient"]
