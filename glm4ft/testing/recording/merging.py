"""Merges the traces of several processes into that of an equivalent single process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from glm4ft.testing.recording.trace import Step, Tensors, Trace

# The relative difference that rounding may make. gloo and NCCL leave the same bits on every process.
ROUNDING = 1e-6


def merge_ranks(traces: Sequence[Trace]) -> Trace:
    """Merge the traces of several processes into the trace that one process would have recorded.

    Under DistributedDataParallel each process records the gradient of its own rows, which is then averaged over all
    processes; under FSDP2 it records its part of the averaged gradient. Either way the gradient at the final norm
    enters with a weight of one over the number of processes.

    Args:
        traces: The trace of each process, over the same steps.
    """
    count, sharded = min(len(trace.steps) for trace in traces), traces[0].sharded
    steps = [_merge_step([trace.steps[i] for trace in traces], sharded) for i in range(count)]
    return replace(traces[0], steps=steps, sharded={})


def _merge_step(steps: Sequence[Step], sharded: Mapping[str, int]) -> Step:
    forwards = [
        replace(f, gradient_BTD=None if f.gradient_BTD is None else f.gradient_BTD / len(steps), process=process)
        for process, step in enumerate(steps)
        for f in step.forwards
    ]
    names = set.intersection(*(set(step.raw) for step in steps))
    raw = {n: torch.stack([s.raw[n].double() for s in steps]).mean(0) for n in sorted(names - sharded.keys())}
    whole: dict[str, Any] = {
        part: {**getattr(steps[0], part), **_joined([getattr(step, part) for step in steps], sharded)}
        for part in ("clipped", "before", "after")
    }
    raw |= _joined([step.raw for step in steps], sharded)
    norms = {**steps[0].norms, "raw": {}}  # the norm of a mean does not follow from those of its parts
    return replace(steps[0], forwards=forwards, raw=raw, norms=norms, **whole)


def _joined(parts: Sequence[Tensors], sharded: Mapping[str, int]) -> Tensors:
    """The whole tensors of those that each process holds a part of."""
    names = [name for name in sharded if all(name in part for part in parts)]
    return {name: torch.cat([part[name] for part in parts], sharded[name]) for name in names}


def first_difference(traces: Sequence[Trace]) -> tuple[int, str]:
    """The first step in which the processes differ, and in what; (0, "") if they never do.

    Args:
        traces: The trace of each process, over the same steps.
    """
    sharded = traces[0].sharded.keys()
    for number, steps in enumerate(zip(*(trace.steps for trace in traces), strict=False), start=1):
        first, others = steps[0], steps[1:]
        for name in sorted(first.clipped.keys() - sharded):
            if any(not _is_equal(first.clipped[name], step.clipped.get(name)) for step in others):
                return number, f"the {len(steps)} processes have different gradients, e.g. of {name}"
        for name in sorted(first.after.keys() - sharded):
            if any(not torch.equal(first.after[name], step.after[name]) for step in others):
                return number, f"the {len(steps)} processes hold different parameters after it, e.g. {name}"
    return 0, ""


def _is_equal(gradient: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether an averaged gradient is that of another process, as the sum over processes leaves it on each."""
    return other is not None and not float((gradient - other).norm()) > ROUNDING * float(gradient.norm())  # or NaN
