"""The lowest held-out loss of a run: its adapter is kept aside, and training stops when later ones stay above it.

Unlike transformers' ``load_best_model_at_end``, this does not depend on when checkpoints are written and removed, and a
resumed run goes on with the evaluations that its trajectory holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from glm4ft.errors import ConfigError
from glm4ft.files import finite, write_atomically
from glm4ft.train.trajectory import FILE_NAME, read_trajectory

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Args:
        step: The optimizer step after which it was made.
        eval_loss: The mean loss over the held-out tokens, in nats.
    """

    step: int
    eval_loss: float

    def folder(self, output: Path) -> Path:
        """The folder of its adapter, in the folder of the run."""
        return output / f"best-{self.step}"


def lowest(evaluations: Sequence[Mapping[str, Any]]) -> Best | None:
    """The first of the evaluations with the lowest loss; None if no loss is finite.

    Args:
        evaluations: Rows of a trajectory, with ``step`` and ``eval_loss``.
    """
    known = [Best(int(row["step"]), loss) for row in evaluations if (loss := finite(row["eval_loss"])) is not None]
    return min(known, key=lambda best: (best.eval_loss, best.step), default=None)


def is_exhausted(evaluations: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether so many evaluations since the best one were no better that training stops.

    Args:
        evaluations: Rows of a trajectory, in order.
        patience: The number of evaluations; None to go on for ever.
    """
    best = lowest(evaluations)
    return patience is not None and sum(row["step"] > (best.step if best else 0) for row in evaluations) >= patience


def read_best(output: Path) -> Best | None:
    """The evaluation whose adapter a run has kept, or None."""
    try:
        stored = json.loads((output / BEST_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None
    return Best(int(stored["step"]), float(stored["eval_loss"]))


def describe_evaluations(evaluations: Sequence[Mapping[str, Any]], kept: Best | None) -> str:
    """The evaluations of a run in one line; "" if there were none.

    Args:
        evaluations: Rows of a trajectory, in order.
        kept: The evaluation whose adapter the run has kept, or None.
    """
    if not evaluations:
        return ""
    last, best = evaluations[-1], kept or lowest(evaluations)
    if best is None or last["eval_loss"] is None:
        return f"held-out loss not finite at step {last['step']}"
    text = f"held-out loss {last['eval_loss']:.4f} at step {last['step']}"
    if best.step == last["step"]:
        return text + (", the lowest" if len(evaluations) > 1 else "")
    advice = "whose adapter is kept" if kept else "which --keep_best true would have kept"
    return f"{text}; lowest {best.eval_loss:.4f} at step {best.step}, {advice}"


def log_of_adapter(output: Path) -> tuple[dict[str, Any], ...]:
    """The steps and evaluations that led to a run's adapter: all of them, or those up to the best evaluation.

    Args:
        output: The folder of the run, with its trajectory.
    """
    trajectory, best = read_trajectory(output / FILE_NAME), read_best(output)
    rows = sorted((*trajectory.steps, *trajectory.evaluations), key=lambda row: int(row["step"]))
    return tuple(row for row in rows if best is None or row["step"] <= best.step)


def restore_best(model: PeftModel, output: Path) -> None:
    """Give a model the adapter that was kept; it stays as it is if none was."""
    if best := read_best(output):
        model.load_adapter(str(best.folder(output)), "default", is_trainable=True)


class WatchEvaluations(TrainerCallback):
    """Keeps the adapter of the best evaluation, and stops training when patience ends.

    Args:
        trainer: The trainer, with an adapter that each process holds whole.
        output: The folder of the run.
        keep_best: Whether the adapter of the best evaluation is kept.
        patience: The number of evaluations without a new best after which training stops; None for no end.
    Raises:
        ConfigError: If the adapter is to be kept, but no process holds it whole.
    """

    def __init__(self, trainer: Trainer, output: Path, *, keep_best: bool, patience: int | None) -> None:
        if keep_best and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise ConfigError("no process holds the whole adapter under FSDP or DeepSpeed", where="--keep_best")
        self.trainer, self.output, self.keep_best, self.patience = trainer, output, keep_best, patience
        self.evaluations: list[dict[str, Any]] = []

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the evaluations of a run that is resumed."""
        if (self.output / FILE_NAME).is_file():
            self.evaluations = list(read_trajectory(self.output / FILE_NAME).evaluations)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare an evaluation with those before it."""
        metrics = kwargs["metrics"]
        row = {"step": state.global_step, "eval_loss": metrics["eval_loss"]}
        self.evaluations = [other for other in self.evaluations if other["step"] < state.global_step] + [row]
        kept = read_best(self.output)
        # a run that was resumed from before the best one may find it again, or not
        is_best = lowest([row]) is not None and (kept is None or row["eval_loss"] < kept.eval_loss)
        if self.keep_best and is_best and args.should_save:
            self._keep(Best(**row))
        if is_exhausted(self.evaluations, self.patience):
            control.should_training_stop = True

    def _keep(self, best: Best) -> None:
        model: Any = self.trainer.model
        folder = best.folder(self.output)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        write_atomically(self.output / BEST_FILE, json.dumps({"schema": 1, **asdict(best)}) + "\n")
        for other in self.output.glob("best-*"):
            if other != folder:
                shutil.rmtree(other)
