"""Finds the model that a running process trains, and records its first optimizer steps into a folder.

Hooks that torch offers for all modules see every forward pass; the first one in training mode through a decoder with
trained parameters is the one to record. Nothing here may stop or change the run: what goes wrong is noted beside the
trace, and the hooks are removed.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from glm4ft.testing.recording import environment
from glm4ft.testing.recording.configuration import local_values, stated_configuration
from glm4ft.testing.recording.description import describe
from glm4ft.testing.recording.discovery import NotFound, decoder_of
from glm4ft.testing.recording.recorder import Recorder
from glm4ft.testing.recording.sampling import SAMPLE, sampled_shapes
from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.recording.trace_file import TRACE, replace_trace

COPIES = 4  # of the trained parameters that a step keeps: before, gradient, clipped gradient, after


def start() -> None:
    """Record this process as the environment asks; called by ``sitecustomize`` after torch was imported."""
    steps = int(os.environ.get(environment.STEPS, environment.DEFAULT_STEPS))
    names = tuple(filter(None, os.environ.get(environment.MODULES, "").split(",")))
    Attachment(Path(os.environ[environment.FOLDER]), steps, names)


@contextmanager
def record_run(
    folder: str | Path, steps: int = environment.DEFAULT_STEPS, modules: Sequence[str] = ()
) -> Iterator[None]:
    """Record the training that happens in the context, whatever code trains.

    Args:
        folder: The folder for the traces; each process writes ``rank-<RANK>`` into it.
        steps: The number of optimizer steps to record.
        modules: The names of embedding, final norm and head, for a model that is no Hugging Face causal language model.
    """
    attachment = Attachment(Path(folder), steps, modules)
    try:
        yield
    finally:
        attachment.close()


class Attachment:
    """Waits for the first training forward pass, records the steps that follow, and writes them after each step.

    Args:
        folder: The folder for the traces.
        steps: The number of optimizer steps to record.
        modules: The names of embedding, final norm and head; empty to find them by structure.
    """

    def __init__(self, folder: Path, steps: int, modules: Sequence[str] = ()) -> None:
        self.folder, self.steps, self.modules = Path(environment.rank_folder(str(folder))), steps, modules
        self.recorder: QuietRecorder | None = None
        self.about: dict[str, Any] = {}
        self.passed = weakref.WeakSet[nn.Module]()  # modules that hold no decoder: encoders, losses, blocks
        self.why_not, self.has_given_up = "", False
        self.waiting = register_module_forward_pre_hook(self._forward_begins)
        atexit.register(self.close)

    def close(self) -> None:
        """Remove all hooks, and write what only the end of the run shows: that it took no step."""
        self.waiting.remove()
        atexit.unregister(self.close)
        if self.recorder:
            self.recorder.close()
            if not self.recorder.trace.steps and not self.has_given_up:
                self.keep(self.recorder.trace)
        elif self.why_not and not self.has_given_up and not (self.folder / TRACE).exists():
            environment.note(str(self.folder), self.why_not)

    def _forward_begins(self, module: nn.Module, args: Any) -> None:
        if not (self.recorder or module in self.passed) and torch.is_grad_enabled() and module.training:
            uncompiled(self._begin)(module, args)

    def _begin(self, module: nn.Module, args: Any) -> None:
        """Record from this forward pass on, if it is one through a decoder with trained parameters."""
        model = self._model_of(module)
        if model is None:
            return
        if not any(parameter.requires_grad for parameter in model.parameters()):
            self.why_not = "a decoder ran in training mode, but none of its parameters is trained: all are frozen"
            return
        self.waiting.remove()
        try:
            if (self.folder / TRACE).exists():
                raise ValueError("another process of this rank has been recorded")
            if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
                raise ValueError("FSDP's first version splits the parameters over the processes; FSDP2 is recorded")
            _require_memory(model, self.steps)
            self.about = describe(model, stated_configuration(sys._getframe(1)))
            self.recorder = QuietRecorder(model, self)
            if module is self.recorder.decoder.embedding:  # its own hooks act from its next call on
                self.recorder.ids_embedded(module, args)
            self.why_not = ""
        except ValueError as error:  # the run goes on unrecorded
            self.give_up(str(error))
        except Exception as error:
            self.give_up(f"the run cannot be recorded: {error!r}")

    def _model_of(self, module: nn.Module) -> nn.Module | None:
        """The model with a decoder that a forward pass begins in; None if there is none, which may come later.

        A loop that calls the body and the head itself never calls the whole model, but has it at hand.
        """
        for model in (
            unwrapped(module),
            *(held for held in held_modules(sys._getframe(2)) if module in held.modules()),
        ):
            try:
                decoder_of(model, self.modules)
            except NotFound as error:
                self.why_not = self.why_not or f"no decoder was found: {error}"
            else:
                return model
        self.passed.add(module)
        return None

    def keep(self, trace: Trace) -> None:
        """Write what has been recorded so far."""
        try:
            assert self.recorder is not None
            replace_trace(trace, self.folder, {**self.about, "overhead": self.recorder.overhead()})
        except Exception as error:
            self.give_up(f"the trace could not be written: {error}")

    def give_up(self, why: str) -> None:
        """Remove all hooks and note the reason."""
        self.why_not, self.has_given_up = why, True
        environment.note(str(self.folder), why)
        self.waiting.remove()
        atexit.unregister(self.close)
        if self.recorder:
            self.recorder.close()


class QuietRecorder(Recorder):
    """A recorder that hands over its trace after each step, and gives up where another would raise an error.

    Args:
        model: The model that is trained.
        attachment: The receiver of the trace.
    """

    def __init__(self, model: nn.Module, attachment: Attachment) -> None:
        self.attachment = attachment
        self.spent_s, self.began_s = 0.0, time.perf_counter()
        self.seconds: list[tuple[float, float, float]] = []  # of each step, of the hooks in it, and of writing it
        super().__init__(model, attachment.steps, attachment.modules)

    def refuse(self, why: str) -> None:
        """Note why the run cannot be recorded."""
        self.attachment.give_up(why)

    def guarded(self, hook: Any, *, in_forward: bool = False) -> Any:
        """The hook, which gives the recording up instead of raising an error in the run."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                self.attachment.give_up(f"the run cannot be recorded: {error!r}")
                return None
            finally:
                self.spent_s += time.perf_counter() - began_s

        return uncompiled(call) if in_forward else call

    def step_recorded(self) -> None:
        """Write the trace."""
        now_s = time.perf_counter()
        self.seconds.append((now_s - self.began_s, self.spent_s, 0.0))
        self.attachment.keep(self.trace)
        self.began_s = time.perf_counter()
        self.seconds[-1] = (*self.seconds[-1][:2], self.began_s - now_s)
        self.spent_s = now_s - self.began_s  # what the hook around this adds again

    def overhead(self) -> dict[str, Any]:
        """What recording costs: the seconds of each step, in hooks and of writing it, and the memory of the trace.

        A step's time has that of its hooks in it, but not that of writing; the last step's writing is not known yet.
        """
        columns = zip(*self.seconds, strict=True) if self.seconds else ((), (), ())
        named = zip(("step_s", "hooks_s", "write_s"), columns, strict=True)
        return {
            **{name: [round(x, 6) for x in seconds] for name, seconds in named},
            "trace_bytes": self.trace.num_bytes,
        }


def uncompiled(hook: Any) -> Any:
    """The hook, which in a compiled model runs between graphs: compiling it as well fails, or fills the terminal."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def _require_memory(model: nn.Module, steps: int) -> None:
    """Raise ValueError if the copies of the trained parameters would take half of this machine's memory."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    split = {name: 0 for name, p in parameters.items() if hasattr(p, "to_local")}
    sampled = sampled_shapes(parameters, split)
    trained = sum((SAMPLE if n in sampled else p.numel()) * p.element_size() for n, p in parameters.items())
    needed, memory = COPIES * steps * trained, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise ValueError(
            f"recording {steps} steps of {trained / 1e9:.3g} GB of trained parameters takes {needed / 1e9:.3g} GB, "
            f"over half of this machine's memory of {memory / 1e9:.3g} GB; record fewer steps (--steps 1)"
        )


def held_modules(frame: FrameType | None) -> Iterator[nn.Module]:
    """The modules among the local variables of a frame and of its callers, without their wrappers."""
    seen = set[int]()
    for value in local_values(frame):
        if isinstance(value, nn.Module) and id(value) not in seen:
            seen.add(id(value))
            yield unwrapped(value)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model below wrappers such as DistributedDataParallel and ``torch.compile``."""
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and len(list(model.children())) == 1:
            return unwrapped(inner)
    return model
