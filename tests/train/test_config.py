"""An option out of range is refused by name, value and bound; the defaults are those the help states.

Run: pytest tests/train/test_config.py
"""

from __future__ import annotations

from typing import Any

import pytest

from glm4ft.errors import ConfigError
from glm4ft.train.config import TrainConfig


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("max_length", 0, "at least 1"),
        ("micro_batch_size", -1, "at least 1"),
        ("accumulation", 0, "at least 1"),
        ("warmup_steps", -1, "at least 0"),
        ("weight_decay", float("nan"), "at least 0"),
        ("max_grad_norm", float("inf"), "at least 0"),
        ("learning_rate", 0.0, "more than 0"),
        ("learning_rate", float("nan"), "more than 0"),
        ("target_loss", -1.0, "more than 0"),
        ("max_steps", 0, "more than 0"),
        ("epochs", float("inf"), "more than 0"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "at most 4294967295"),
    ],
)
def test_option_out_of_range_is_refused(name: str, value: Any, bound: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: value})
    assert (caught.value.where, caught.value.found) == (f"--{name}", repr(value))
    assert bound in caught.value.expected


def test_rate_defaults_to_that_of_the_base() -> None:
    """The built-in base takes a rate that would wreck a pretrained one."""
    assert TrainConfig().peak_learning_rate == 5e-3
    assert TrainConfig(model="zai-org/GLM-4-9B-0414").peak_learning_rate == 2e-4
    assert TrainConfig(learning_rate=1e-5).peak_learning_rate == 1e-5
