"""What rounding does to a run in low precision, measured on the rows and parameters that were recorded.

A fixed limit is too wide for a small model and too narrow for a deep one. The specification computes in fp32; here it
is computed again with the output of every module, and every gradient that flows back through it, rounded to the dtype
of the run. What that changes is the size of what the run's own rounding may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.replay.comparison import relative
from glm4ft.testing.specification.reference import LabelledIds, Reference

# Runs of 8 steps under bf16 autocast whose rounding is nothing but legitimate, in 44 variations of packing, batches,
# checkpointing and layers, differed from the specification by at most 2.1 times what is measured here (tiny base,
# x86-64 CPU, 2026-11-27; tests/sweeps/record_faults.py --bf16 prints the share of the limit). Over 20 seeds and all
# plans of a trial a gradient came to 3.7 times (docs/thresholds.md), so one beyond the limit is measured by itself.
MARGIN = 4.0
MAX_ROWS = 4  # the longest ones, in which most rounding adds up


def measured_limits(reference: Reference, trace: Trace, rows: Sequence[LabelledIds]) -> dict[str, float]:
    """Measure the largest relative departure that counts as rounding in a run.

    Args:
        reference: The specification on the run's base.
        trace: The recording.
        rows: The rows of the run.
    Returns:
        The limit of each stage whose limit depends on the forward pass, and of a logged ``loss``; empty for a run in
        fp32, whose limits are fixed, and without rows that learn anything.
    Source: the tolerances of TTrace, arXiv 2506.09280, which come from perturbing the input by the machine epsilon.
    """
    longest = sorted((row for row in rows if any(label >= 0 for label in row[1])), key=lambda row: len(row[0]))
    if trace.dtype not in (torch.bfloat16, torch.float16) or not longest or not trace.steps:
        return {}
    longest = longest[-MAX_ROWS:]
    forward, backward, loss = 0.0, 0.0, 0.0
    last = 0 if trace.sampled else -1
    for step in (trace.steps[0], trace.steps[last]):  # before the first step the matrices B are zero
        exact = reference.gradient(longest, step.weights)
        with rounded(reference, trace.dtype):
            backward = max(backward, relative(reference.gradient(longest, step.weights), exact))
        for row in longest:
            with torch.no_grad():
                alone, own = reference.hidden(row[0], step.weights), float(reference.loss([row], step.weights))
                with rounded(reference, trace.dtype):
                    rough, other = reference.hidden(row[0], step.weights), reference.loss([row], step.weights)
            forward = max(forward, float((rough - alone).norm() / alone.norm()))
            loss = max(loss, abs(float(other) / own - 1))
    sizes = {"batches": forward, "model": forward, "gradient": backward, "loss": loss}
    return {what: MARGIN * size for what, size in sizes.items()}


@contextmanager
def rounded(reference: Reference, dtype: torch.dtype) -> Iterator[None]:
    """Round what each innermost module of the base returns to a dtype while the context is open."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        return output.to(dtype).to(output.dtype) if isinstance(output, torch.Tensor) else output

    innermost = [module for module in reference.body.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(hook) for module in innermost]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
