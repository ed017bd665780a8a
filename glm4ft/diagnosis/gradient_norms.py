"""Gradient norms of a run: how each compares with its neighbourhood."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW = 20


def spike_ratios(grad_norms: Sequence[float]) -> list[float]:
    """Each step's norm over the running median of the ``WINDOW`` steps before it, from the second step on.

    The running median follows a healthy run down over several orders of magnitude, where the largest norm over the
    smallest would call it unstable.
    """
    return [
        grad_norms[i] / max(statistics.median(grad_norms[max(0, i - WINDOW) : i]), 1e-30)
        for i in range(1, len(grad_norms))
    ]
