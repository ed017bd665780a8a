"""Writes and reads traces without pickle: tensors as safetensors, everything else as JSON."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from glm4ft.files import write_atomically
from glm4ft.testing.recording.trace import Forward, ParameterGroup, Step, Tensors, Trace

_TENSORS = ("raw", "clipped", "before", "after")
_FIELDS = ("input_ids_BT", "positions_BT", "attention_mask", "hidden_BTD", "gradient_BTD")


def replace_trace(trace: Trace, folder: Path, about: Any) -> None:
    """Write a trace in place of the one in a folder; a process that is killed leaves one of the two, whole.

    Args:
        trace: The trace of a run.
        folder: The folder, which need not exist.
        about: What else is known of the run; anything that JSON can represent.
    """
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_trace(trace, unfinished, about)
    folder.mkdir(parents=True, exist_ok=True)
    # tensors first, under a name that the JSON states: JSON and tensors of two traces are never read together
    tensors = f"tensors-{len(trace.steps)}.safetensors"
    os.replace(unfinished / "tensors.safetensors", folder / tensors)
    text = json.loads((unfinished / "trace.json").read_text("utf-8"))
    write_atomically(folder / "trace.json", json.dumps({**text, "tensors": tensors}))
    for old in folder.glob("tensors-*.safetensors"):
        if old.name != tensors:
            old.unlink()
    shutil.rmtree(unfinished)


def write_trace(trace: Trace, folder: Path, log: Any) -> None:
    """Write a trace without its evaluations, and the log that ``train`` returned.

    Args:
        trace: The trace of a run.
        folder: The folder to create and write to.
        log: The log; anything that JSON can represent.
    """
    folder.mkdir(parents=True)
    tensors: Tensors = {}
    for i, step in enumerate(trace.steps):
        for name in _TENSORS:
            tensors |= {f"{i}/{name}/{n}": t.contiguous() for n, t in getattr(step, name).items()}
        for j, forward in enumerate(step.forwards):
            found = {name: getattr(forward, name) for name in _FIELDS}
            tensors |= {f"{i}/forward-{j}/{name}": t.contiguous() for name, t in found.items() if t is not None}
    save_file(tensors, folder / "tensors.safetensors")
    steps = [{"optimizer": s.optimizer, "training": [f.training for f in s.forwards],
              "groups": [{"names": g.names, "size": g.size, "settings": _plain(g.settings)} for g in s.groups]}
             for s in trace.steps]  # fmt: skip
    names = {"trained": trace.trained, "optimized": trace.optimized, "dtype": str(trace.dtype).removeprefix("torch.")}
    (folder / "trace.json").write_text(json.dumps({**names, "steps": steps, "log": log}), "utf-8")


def read_trace(folder: Path) -> tuple[Trace, Any]:
    """Read a trace that ``write_trace`` wrote.

    Returns:
        The trace and the log.
    """
    stored = json.loads((folder / "trace.json").read_text("utf-8"))
    tensors = load_file(folder / stored.get("tensors", "tensors.safetensors"))
    steps = [_step(i, step, tensors) for i, step in enumerate(stored["steps"])]
    dtype = getattr(torch, stored["dtype"])
    return Trace(steps, dtype, tuple(stored["trained"]), tuple(stored["optimized"])), stored["log"]


def _step(i: int, stored: dict[str, Any], tensors: Tensors) -> Step:
    def below(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    forwards = []
    for j, training in enumerate(stored["training"]):
        fields: dict[str, Any] = {**dict.fromkeys(_FIELDS), **below(f"{i}/forward-{j}/")}
        forwards.append(Forward(**fields, training=training))
    groups = [ParameterGroup(tuple(g["names"]), g["settings"], g["size"]) for g in stored["groups"]]
    parts: dict[str, Any] = {name: below(f"{i}/{name}/") for name in _TENSORS}
    return Step(forwards, groups=groups, optimizer=stored["optimizer"], **parts)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that JSON can represent, tensors as numbers."""
    plain = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
    return {name: value for name, value in plain.items() if isinstance(value, (int, float, bool, str, tuple, list))}
