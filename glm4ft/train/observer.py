"""What watches a run: the interface of observers, and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.data_report import DataReport
from glm4ft.data.stored_rows import JoinedRows, Rows
from glm4ft.errors import RunError
from glm4ft.model.base_model import Base
from glm4ft.model.lora import AdapterReport
from glm4ft.train.config import TrainConfig


@dataclass
class PreparedRun:
    """Everything that a run needs before its first step, read and checked.

    Args:
        config: The options; an observer may replace them until the run begins.
        output: The folder of the run.
        chat_format: The encoder of the conversations.
        rows: The encoded conversations.
        data: What became of the conversations.
        eval_rows: The held-out conversations, or None.
        base: The base.
        model: The base with its adapters.
        adapters: What is trained.
        say: A function that is given each line of the account for people.
        is_sharded: Whether no process holds the whole model (FSDP, DeepSpeed); known once training has begun.
        is_distributed: Whether there are several processes.
        is_main_process: Whether this process writes files and talks to people.
    """

    config: TrainConfig
    output: Path
    chat_format: ChatFormat
    rows: Rows | JoinedRows
    data: DataReport
    eval_rows: Rows | JoinedRows | None
    base: Base
    model: PeftModel
    adapters: AdapterReport
    say: Callable[[str], object]
    is_sharded: bool = False
    is_distributed: bool = False
    is_main_process: bool = True


class RunObserver:
    """Watches a run from its first check to its last file; a method that is not overridden does nothing.

    Whoever starts a run says what watches it, so that training knows nothing of floors, diagnoses and reports.
    """

    def is_done(self, output: Path) -> bool:
        """Whether a run that was trained to its end needs nothing more from this observer.

        Args:
            output: The folder of the run.
        """
        return True

    def on_prepared(self, run: PreparedRun) -> None:
        """Act once all input has been read and nothing has been written; ``run.config`` may be replaced."""

    def on_begin(self, run: PreparedRun) -> None:
        """Write into the new folder of the run; on the main process only, and not when a run is resumed."""

    def on_end(self, run: PreparedRun) -> None:
        """Act once the adapter is trained and saved."""

    def on_failure(self, run: PreparedRun, error: RunError) -> None:
        """Act when the run has to stop; the error is raised again afterwards."""
