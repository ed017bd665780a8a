"""Records the optimizer steps of a model that this process trains, in memory or on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from glm4ft.testing.recording.recorder import Recorder
from glm4ft.testing.recording.trace import Tensors, Trace
from glm4ft.testing.recording.trace_file import STEP_TENSORS, mapped


@contextmanager
def record(model: nn.Module, max_steps: int, folder: Path | None = None) -> Iterator[Trace]:
    """Record the optimizer steps taken while the context is open.

    Args:
        model: The model with its adapters attached; in the context it may be wrapped, moved and trained.
        max_steps: The number of steps to record; then the hooks are removed and the run goes on at full speed.
        folder: An empty folder for the gradients and parameters of the steps, where there are too many of them for the
            memory; None keeps them there.
    Yields:
        The trace, filled as the run proceeds.
    """
    recorder = Recorder(model, max_steps) if folder is None else _OnDisk(model, max_steps, folder)
    try:
        yield recorder.trace
    finally:
        recorder.close()


class _OnDisk(Recorder):
    """Keeps the tensors of each step in a file, those that a step finds as the last one left them in one place."""

    def __init__(self, model: nn.Module, max_steps: int, folder: Path) -> None:
        super().__init__(model, max_steps)
        self.folder, self.left = folder, Tensors()

    def step_recorded(self) -> None:
        step = self.trace.steps[-1]
        held = {str(id(t)): t for part in STEP_TENSORS for t in getattr(step, part).values()}
        file = self.folder / f"{len(list(self.folder.iterdir()))}.safetensors"
        kept = self.left | mapped({key: t for key, t in held.items() if key not in self.left}, file)
        for part in STEP_TENSORS:
            setattr(step, part, {name: kept[str(id(t))] for name, t in getattr(step, part).items()})
        self.left = {str(id(t)): t for t in step.after.values()}
