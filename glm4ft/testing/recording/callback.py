"""Records the first optimizer steps of ``transformers.Trainer``, as one of its callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from glm4ft.testing.recording import environment
from glm4ft.testing.recording.attach import Attachment


class RecordingCallback(TrainerCallback):
    """Records a training run into a folder, for ``glm4ft judge``.

    Args:
        folder: The folder for the traces; by default ``recording`` in the trainer's output folder.
        steps: The number of optimizer steps to record.
    """

    def __init__(self, folder: str | Path = "", steps: int = environment.DEFAULT_STEPS) -> None:
        self.folder, self.steps = folder, steps
        self.attachment: Attachment | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first forward pass."""
        self.attachment = Attachment(self.path(args), self.steps)

    def path(self, args: Any) -> Path:
        """The folder for the traces.

        Args:
            args: The trainer's ``TrainingArguments``.
        """
        return Path(self.folder or Path(args.output_dir, "recording"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove all hooks."""
        if self.attachment:
            self.attachment.close()
