"""Compares measured sizes with their limits in one place, so that each limit can be listed with the sizes it met."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# The largest relative departure that counts as rounding, by the dtype of the base. In fp32, 240 clean runs of 10 steps
# (20 seeds, padded and packed, 1, 2 and 4 micro-batches, clipping on and off; x86-64 CPU, 2026-11-25) stayed below
# 8.3e-7 for batches, 8.4e-7 for the model, 2.2e-6 for the gradient, 1.9e-7 for clipping, and below rounding for the
# update; see tests/sweeps/clean_departures.py.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# The number of layers up to which the limit of a gradient in fp32 holds; rounding adds up over the layers of a deeper
# base. Measured: at most 1.9e-6 with 2 layers (docs/thresholds.md), 1.1e-5 with the 30 of SmolLM2-135M (x86-64 CPU,
# 2026-11-27); the nearest fault departs by 1.2e-3.
SHALLOW = 8
# The same for a token's weight in the loss. It is recovered from a gradient that shrinks as the model grows certain of
# the token, so it is known less precisely.
WEIGHT_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
# A target that the model predicts with at least this probability may leave no gradient in the dtype of the run, so a
# missing gradient there does not show that the target is masked, and a small one not what it weighs.
SURE = 0.999
# The least relative difference of two weights within a row that is taken for weights of single tokens: 2.5 times the
# wider of the limits above, so that no rounding reaches it. Of 230 faults in recorded runs that weigh the tokens of a
# row alike, in fp32 and bf16, none did (tests/sweeps/record_faults.py; x86-64 CPU, 2026-11-27).
UNEVEN = 0.25
# The largest residual, relative to a wrong gradient or update, with which a cause counts as its explanation.
EXPLAINED = 1e-3
# The smallest factor that counts as loss scaling, which fp16 training needs: a power of two at least this large.
MIN_LOSS_SCALE = 2.0**8


@dataclass(frozen=True)
class Observation:
    """One comparison of a measured size with its limit.

    Args:
        name: The name of the threshold.
        size: The measured size; larger is worse.
        limit: The largest size that passes.
    """

    name: str
    size: float
    limit: float


_observers: list[list[Observation]] = []


def within(name: str, size: float, limit: float, *, is_measured: bool = False) -> bool:
    """Whether a size is at most its limit; False for NaN.

    Args:
        name: The name of the threshold in docs/thresholds.md.
        size: The measured size; larger is worse.
        limit: The largest size that passes.
        is_measured: Whether the limit was measured on the run itself, so that the size is listed as a share of it.
    """
    if is_measured:
        name, size, limit = f"{name}, as a share of the run's own limit", size / max(limit, sys.float_info.min), 1.0
    for observer in _observers:
        observer.append(Observation(name, size, limit))
    return size <= limit


@contextmanager
def observing() -> Iterator[list[Observation]]:
    """Collect the comparisons that ``within`` makes while the context is open."""
    seen: list[Observation] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.remove(seen)
