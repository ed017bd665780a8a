"""Judges the first steps of ``transformers.Trainer`` while it trains, and hands the verdict to the run's trackers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from glm4ft.errors import InputError
from glm4ft.testing.recording import environment
from glm4ft.testing.recording.callback import RecordingCallback
from glm4ft.testing.recording.configuration import local_values
from glm4ft.testing.trial.recorded import judge_recording
from glm4ft.testing.trial.recorded_text import lines

VERDICT = "verdict"  # the key of the text in the logs; trackers show it as train/verdict


class JudgingCallback(RecordingCallback):
    """Records a training run, judges it one step later, and logs the verdict once, as text.

    It is logged as the trainer logs its losses, so it reaches whatever ``report_to`` names: TensorBoard, Weights &
    Biases, trackio. The main process judges, with a second copy of the base on the CPU.

    Args:
        folder: The folder for the traces; by default ``recording`` in the trainer's output folder.
        steps: The number of optimizer steps to record.
        data: The conversations that the run trains on; None to judge rows by the base's chat template alone.
        model: The model folder of the base; by default the one that the run loaded.
    """

    def __init__(
        self,
        folder: str | Path = "",
        steps: int = environment.DEFAULT_STEPS,
        data: str | None = None,
        model: str = "",
    ) -> None:
        super().__init__(folder, steps)
        self.data, self.model = data, model
        self.is_recorded = self.is_judged = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge one step after the last recorded one: by then every process has written its trace."""
        if self.is_recorded:
            self._judge(args, state, control)
        recorder = self.attachment and self.attachment.recorder
        self.is_recorded = bool(recorder and len(recorder.trace.steps) >= self.steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove all hooks, and judge a run that ended before."""
        super().on_train_end(args, state, control, **kwargs)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self._judge(args, state, control)

    def _judge(self, args: Any, state: Any, control: Any) -> None:
        if self.is_judged or not state.is_world_process_zero:
            return
        self.is_judged = True
        try:
            with torch.random.fork_rng(devices=[]):  # the run's random numbers stay its own
                text = "\n".join(lines(judge_recording(self.path(args), self.model, self.data)))
        except InputError as error:
            text = f"not judged: {error}"
        handlers = (v for v in local_values(sys._getframe(1)) if type(v).__name__ == "CallbackHandler")
        due = control.should_log
        if handler := next(handlers, None):
            handler.on_log(args, state, control, {VERDICT: text})
        control.should_log = due  # that event takes the step's own log for done
