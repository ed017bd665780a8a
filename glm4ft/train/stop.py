"""SIGTERM and SIGINT during training: the step in progress is finished and a checkpoint written, then the run ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from glm4ft.errors import Interrupted

_SAYS = b"\nglm4ft: stopping after this step, with a checkpoint; once more to stop at once\n"


@dataclass
class StopRequest:
    """Whether a run is to stop.

    Args:
        signal_number: The signal that asked for it, or None.
        is_answered: Whether training has stopped for it.
    """

    signal_number: int | None = None
    is_answered: bool = False


@contextlib.contextmanager
def stopping_after_a_step() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; the second ends the run at once.

    Yields:
        The request, for ``StopAfterStep``.
    Raises:
        Interrupted: At the end, if a signal came; at once, if a second one did.
    """
    request = StopRequest()

    def ask(number: int, _: Any) -> None:
        if request.signal_number is not None:
            raise Interrupted(number)
        request.signal_number = number
        os.write(2, _SAYS)  # print may be what the signal interrupted

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
        signals = (signal.SIGTERM, signal.SIGINT)
        # a run in the background of a script ignores SIGINT, and is to go on doing so
        before = {
            number: signal.signal(number, ask) for number in signals if signal.getsignal(number) != signal.SIG_IGN
        }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.signal_number is not None:
        raise Interrupted(request.signal_number)


class StopAfterStep(TrainerCallback):
    """Answers a request with a checkpoint after the step, on all processes after the same one.

    Args:
        request: The request.
        trainer: The trainer.
    """

    def __init__(self, request: StopRequest, trainer: Trainer) -> None:
        self.request, self.trainer = request, trainer

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of training."""
        is_asked = self.request.signal_number is not None
        if args.world_size > 1:  # the signal may reach some of them only, or in different steps
            is_asked = bool(self.trainer.accelerator.reduce(torch.tensor(int(is_asked), device=args.device)))
        if is_asked:
            self.request.signal_number = self.request.signal_number or int(signal.SIGTERM)
            self.request.is_answered = True
            control.should_save = control.should_training_stop = True
