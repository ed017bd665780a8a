"""Ratios of a run's gradient norms to the norms of the steps before."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW = 20


def spike_ratios(grad_norms: Sequence[float]) -> list[float]:
    """Divide each step's norm by the running median of the ``WINDOW`` steps before it, from the second step on.

    The norms of a healthy run fall by several orders of magnitude. The running median follows them, while the ratio of
    the largest to the smallest norm would make such a run look unstable.

    Args:
        grad_norms: The gradient norm of each step.
    Returns:
        The ratios; the first is that of the second step.
    """
    return [
        grad_norms[i] / max(statistics.median(grad_norms[max(0, i - WINDOW) : i]), 1e-30)
        for i in range(1, len(grad_norms))
    ]
