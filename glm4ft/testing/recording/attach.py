"""Finds the model that a running process trains, and records its first optimizer steps into a folder.

Hooks that torch offers for all modules see every forward pass; the first one in training mode through a decoder with
trained parameters is the one to record. Nothing here may stop or change the run: what goes wrong is noted beside the
trace, and the hooks are removed.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from glm4ft.testing.recording.recorder import Recorder, backbone_of
from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.recording.trace_file import replace_trace

FOLDER, STEPS = "GLM4FT_RECORD", "GLM4FT_RECORD_STEPS"
DEFAULT_STEPS = 4
NOTE = "not-recorded.txt"


def start() -> None:
    """Record this process as the environment asks; called by ``sitecustomize`` after torch was imported."""
    Attachment(Path(os.environ[FOLDER]), int(os.environ.get(STEPS, DEFAULT_STEPS)))


@contextmanager
def record_run(folder: str | Path, steps: int = DEFAULT_STEPS) -> Iterator[None]:
    """Record the training that happens in the context, whatever code trains.

    Args:
        folder: The folder for the traces; each process writes ``rank-<RANK>`` into it.
        steps: The number of optimizer steps to record.
    """
    attachment = Attachment(Path(folder), steps)
    try:
        yield
    finally:
        attachment.close()


class Attachment:
    """Waits for the first training forward pass, records the steps that follow, and writes them after each step.

    Args:
        folder: The folder for the traces.
        steps: The number of optimizer steps to record.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder / f"rank-{os.environ.get('RANK', '0')}", steps
        self.recorder: Recorder | None = None
        self.about: dict[str, Any] = {}
        self.waiting = register_module_forward_pre_hook(self._forward_begins)
        atexit.register(self.close)

    def close(self) -> None:
        """Remove all hooks."""
        self.waiting.remove()
        if self.recorder:
            self.recorder.close()

    def _forward_begins(self, module: nn.Module, args: Any) -> None:
        if self.recorder or not (torch.is_grad_enabled() and module.training):
            return
        model = unwrapped(module)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return
        try:
            backbone_of(model)
        except ValueError:
            return  # an encoder, a loss, a block: the decoder may come later
        self.waiting.remove()
        try:
            if (self.folder / "trace.json").exists():
                raise ValueError("another process of this rank has been recorded")
            self.about = describe(model)
            self.recorder = QuietRecorder(model, self.steps, self)
        except Exception as error:  # the run goes on unrecorded
            self.give_up(str(error))

    def keep(self, trace: Trace) -> None:
        """Write what has been recorded so far."""
        try:
            replace_trace(trace, self.folder, self.about)
        except Exception as error:
            self.give_up(f"the trace could not be written: {error}")

    def give_up(self, why: str) -> None:
        """Remove all hooks and note the reason."""
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / NOTE).write_text(why + "\n", "utf-8")


class QuietRecorder(Recorder):
    """A recorder that hands over its trace after each step, and gives up where another would raise an error.

    Args:
        model: The model that is trained.
        max_steps: The number of steps to record.
        attachment: The receiver of the trace.
    """

    def __init__(self, model: nn.Module, max_steps: int, attachment: Attachment) -> None:
        super().__init__(model, max_steps)
        self.attachment = attachment

    def refuse(self, why: str) -> None:
        """Note why the run cannot be recorded."""
        self.attachment.give_up(why)

    def guarded(self, hook: Any) -> Any:
        """The hook, which gives the recording up instead of raising an error in the run."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                self.attachment.give_up(f"the run cannot be recorded: {error!r}")
                return None

        return call

    def step_recorded(self) -> None:
        """Write the trace."""
        self.attachment.keep(self.trace)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model below wrappers such as DistributedDataParallel and ``torch.compile``."""
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and len(list(model.children())) == 1:
            return unwrapped(inner)
    return model


def describe(model: nn.Module) -> dict[str, Any]:
    """What the judge has to know of the model beside its trace: base, adapter, dropout and number of processes."""
    adapters = getattr(model, "peft_config", None) or {}
    adapter = next(iter(adapters.values()), None)
    named = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    return {
        "base": str(named or ""),
        "adapter": None if adapter is None else json.loads(json.dumps(adapter.to_dict(), default=_as_list)),
        "dropout": max(dropouts, default=0.0),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _as_list(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
