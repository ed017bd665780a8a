"""Writes and reads traces without pickle: tensors as safetensors, a file for each step, all else as JSON."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from glm4ft.testing.recording.trace import Forward, ParameterGroup, Step, Tensors, Trace

Layout = list[Any]

TRACE = "trace.json"
STEP_TENSORS = ("raw", "clipped", "before", "after")
_FIELDS = ("input_ids_BT", "positions_BT", "attention_mask", "hidden_BTD", "gradient_BTD")


def replace_trace(trace: Trace, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a trace in place of the one in a folder; a process that is killed leaves one that can be read.

    Of the steps, only the last and those that are not there yet are written. Their tensors come first: those of more
    steps than the JSON states are not read.

    Args:
        trace: The trace of a run, with at least the steps of the one in the folder.
        folder: The folder, which need not exist.
        about: What else is known of the run; anything that JSON can represent.
    """
    unfinished, count = folder.with_name(f".{folder.name}.{os.getpid()}"), len(trace.steps)
    shutil.rmtree(unfinished, ignore_errors=True)
    new = [i for i in range(count) if i == count - 1 or not (folder / _tensors_file(i)).exists()]
    _write(trace, new, unfinished, about)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*map(_tensors_file, new), TRACE):
        os.replace(unfinished / name, folder / name)
    unfinished.rmdir()


def write_trace(trace: Trace, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a trace without its evaluations.

    Args:
        trace: The trace of a run.
        folder: The folder to create and write to.
        about: What else is known of the run; anything that JSON can represent.
    """
    _write(trace, range(len(trace.steps)), folder, about)


def _tensors_file(step: int) -> str:
    return f"step-{step + 1}.safetensors"


def _write(trace: Trace, new: Iterable[int], folder: Path, about: Mapping[str, Any]) -> None:
    """Write what is known of a trace, and the tensors of some of its steps."""
    folder.mkdir(parents=True)
    for i in new:
        save_file(_tensors_of(trace.steps[i]), folder / _tensors_file(i))
    layouts: list[Layout] = []
    steps = [_step_record(step, layouts) for step in trace.steps]
    record = {
        "schema": 1,
        **about,
        "dtype": _dtype_name(trace.dtype),
        "autocast": trace.autocast,
        "trained": trace.trained,
        "optimized": trace.optimized,
        "dropout": trace.dropout,
        "foreign_steps": trace.foreign_steps,
        "sharded": trace.sharded,
        "sampled": trace.sampled,
        "layouts": layouts,
        "steps": steps,
    }
    (folder / TRACE).write_text(json.dumps(record, allow_nan=False) + "\n", "utf-8")


def _tensors_of(step: Step) -> Tensors:
    """The tensors of a step, by their names in its file."""
    tensors: Tensors = {}
    for name in STEP_TENSORS:
        tensors |= {f"{name}/{dtype}": flat for dtype, flat in _flattened(getattr(step, name)).items()}
    for j, forward in enumerate(step.forwards):
        found = {name: getattr(forward, name) for name in _FIELDS}
        found |= {f"kept/{name}": kept for name, kept in (forward.kept or {}).items()}
        tensors |= {f"forward-{j}/{name}": t.contiguous() for name, t in found.items() if t is not None}
    return tensors


def mapped(tensors: Tensors, file: Path) -> Tensors:
    """Write tensors to a new file and return them as parts of it, which take memory only while they are looked at."""
    save_file(_flattened(tensors), file)
    return _unflattened(_layout(tensors), load_file(file))


def read_trace(folder: Path) -> tuple[Trace, dict[str, Any]]:
    """Read a trace that ``write_trace`` wrote.

    Returns:
        The trace, and what else is known of the run.
    """
    stored = json.loads((folder / TRACE).read_text("utf-8"))
    found = [load_file(folder / _tensors_file(i)) for i in range(len(stored["steps"]))]
    steps = [_step(*pair, stored["layouts"]) for pair in zip(stored["steps"], found, strict=True)]
    trace = Trace(
        steps,
        getattr(torch, stored["dtype"]),
        tuple(stored["trained"]),
        tuple(stored["optimized"]),
        dropout=stored["dropout"],
        foreign_steps=stored["foreign_steps"],
        autocast=stored["autocast"],
        sharded=stored["sharded"],
        sampled={name: tuple(shape) for name, shape in stored["sampled"].items()},
    )
    return trace, stored


def _flattened(tensors: Tensors) -> Tensors:
    """All entries in one tensor for each dtype: files of few tensors are written many times quicker."""
    by_dtype: dict[str, list[torch.Tensor]] = {}
    for tensor in tensors.values():
        by_dtype.setdefault(_dtype_name(tensor.dtype), []).append(tensor.flatten())
    return {dtype: torch.cat(parts) for dtype, parts in by_dtype.items()}


def _layout(tensors: Tensors) -> Layout:
    """Name, dtype and shape of each tensor, in the order in which their entries are written."""
    return [[name, _dtype_name(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()]


def _unflattened(layout: Layout, flat: Tensors) -> Tensors:
    """The tensors of a layout, as views of the flat ones."""
    found, at = Tensors(), dict.fromkeys(flat, 0)
    for name, dtype, shape in layout:
        size = math.prod(shape)
        found[name] = flat[dtype][at[dtype] : at[dtype] + size].view(shape)
        at[dtype] += size
    return found


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _step_record(step: Step, layouts: list[Layout]) -> dict[str, Any]:
    numbers = {}
    for name in STEP_TENSORS:
        layout = _layout(getattr(step, name))
        if layout not in layouts:  # as a rule all are alike
            layouts.append(layout)
        numbers[name] = layouts.index(layout)
    return {
        "layouts": numbers,
        "optimizer": step.optimizer,
        "forwards": [{"training": f.training, "is_kept": f.kept is not None} for f in step.forwards],
        "groups": [{"names": g.names, "size": g.size, "settings": _plain(g.settings)} for g in step.groups],
        "state_dtypes": {name: _dtype_name(dtype) for name, dtype in step.state_dtypes.items()},
        "num_detached": step.num_detached,
        "norms": {part: _plain(norms) for part, norms in step.norms.items()},
    }


def _step(stored: dict[str, Any], tensors: Tensors, layouts: list[Layout]) -> Step:
    def below(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    forwards = []
    for j, forward in enumerate(stored["forwards"]):
        found = below(f"forward-{j}/")
        kept = {n.removeprefix("kept/"): t for n, t in found.items() if n.startswith("kept/")}
        fields: dict[str, Any] = {name: found.get(name) for name in _FIELDS}
        forwards.append(Forward(**fields, training=forward["training"], kept=kept if forward["is_kept"] else None))
    groups = [ParameterGroup(tuple(g["names"]), g["settings"], g["size"]) for g in stored["groups"]]
    parts: dict[str, Any] = {
        name: _unflattened(layouts[number], below(f"{name}/")) for name, number in stored["layouts"].items()
    }
    dtypes = {name: getattr(torch, dtype) for name, dtype in stored["state_dtypes"].items()}
    return Step(
        forwards, groups=groups, optimizer=stored["optimizer"], state_dtypes=dtypes,
        num_detached=stored["num_detached"], norms=stored["norms"], **parts,
    )  # fmt: skip


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that JSON can represent; what is not finite is left out."""
    return {
        name: value
        for name, value in settings.items()
        if isinstance(value, (int, bool, str, tuple, list)) or (isinstance(value, float) and math.isfinite(value))
    }
