"""Merges the traces of several processes into that of an equivalent single process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from glm4ft.testing.recording.trace import Step, Tensors, Trace


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
        replace(f, gradient_BTD=None if f.gradient_BTD is None else f.gradient_BTD / len(steps))
        for step in steps
        for f in step.forwards
    ]
    names = set.intersection(*(set(step.raw) for step in steps))
    raw = {n: torch.stack([s.raw[n].double() for s in steps]).mean(0) for n in sorted(names - sharded.keys())}
    whole: dict[str, Any] = {
        part: {**getattr(steps[0], part), **_joined([getattr(step, part) for step in steps], sharded)}
        for part in ("clipped", "before", "after")
    }
    return replace(steps[0], forwards=forwards, raw=raw | _joined([step.raw for step in steps], sharded), **whole)


def _joined(parts: Sequence[Tensors], sharded: Mapping[str, int]) -> Tensors:
    """The whole tensors of those that each process holds a part of."""
    names = [name for name in sharded if all(name in part for part in parts)]
    return {name: torch.cat([part[name] for part in parts], sharded[name]) for name in names}


def first_difference(traces: Sequence[Trace]) -> tuple[int, str]:
    """The first step after which the processes' parameters differ, and the name of one that differs; else (0, "")."""
    for number, steps in enumerate(zip(*(trace.steps for trace in traces), strict=False), start=1):
        first: Tensors = steps[0].after
        for name in first.keys() - traces[0].sharded.keys():
            if any(not torch.equal(first[name], step.after[name]) for step in steps[1:]):
                return number, name
    return 0, ""
