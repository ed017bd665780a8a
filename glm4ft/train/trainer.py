"""``transformers.Trainer``, subclassed as thinly as possible.

What differs from the parent: rows come in an order that depends on seed and epoch alone; a step without a target, or
with a number that is not finite, stops the run and names its rows; every step leaves a row in the trajectory;
evaluation is the mean over all held-out tokens; a checkpoint counts only once it is complete.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from glm4ft.data.batching import FILLER_LINE, PackedRows, ShuffledByLength
from glm4ft.errors import RunError
from glm4ft.train.run_folder import complete_checkpoint, drop_old_checkpoints, last_checkpoint

_TRAINING_ARGS_PICKLE, _BLANK_CARD = "training_args.bin", "README.md"


@dataclass
class StepContents:
    """The contents of one optimizer step.

    Args:
        lines: The lines of this process's conversations in their file.
        tokens: The number of tokens on all processes, padding not counted.
        supervised_tokens: The number of supervised tokens on all processes; the divisor of the loss.
        loss: The loss, summed over the micro-batches run so far; on the device, which each read would wait for.
        grad_norm: The global L2 norm of the step's gradient before clipping; None where the engine clips by itself.
        lr: The learning rate of the update.
    """

    lines: list[int] = field(default_factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    loss: float | torch.Tensor = 0.0
    grad_norm: float | torch.Tensor | None = None
    lr: float = math.nan


class SupervisedTrainer(Trainer):
    """Trains a model whose forward returns the token-mean loss of supervised rows (``install_supervised_loss``).

    Args:
        record: A function that is given each trajectory row: ``type`` ``step`` or ``eval`` and its figures.
        target_loss: The loss below which training stops.
        keep_checkpoints: The number of latest checkpoints that stay on disk.
        write_beside: A function that writes into the folder of each saved adapter what belongs beside it.
        **kwargs: The arguments of ``transformers.Trainer``; data sets need ``lengths``, the collator yields ``lines``.
    """

    def __init__(
        self,
        *,
        record: Callable[[dict[str, Any]], None],
        target_loss: float | None = None,
        keep_checkpoints: int = 2,
        write_beside: Callable[[Path], None] = lambda folder: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.record, self.target_loss = record, target_loss
        self.keep_checkpoints, self.write_beside = keep_checkpoints, write_beside
        self.folder = Path(str(self.args.output_dir))
        self.step_contents = StepContents()
        self._step_began_s = time.perf_counter()
        self.remove_callback(PrinterCallback)
        self.add_callback(_StepGuard(self))
        self.add_callback(ProgressBar())

    # --- data ---

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        batch_size = 1 if isinstance(dataset, PackedRows) else self.args.train_batch_size
        processes = self.args.world_size
        at_once = self.args.train_batch_size * processes if processes > 1 else 1
        self.sampler = ShuffledByLength(dataset.lengths, batch_size, self.args.seed, at_once)
        return self.sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of a step, count what they hold, and refuse a step without targets."""
        batches, num_supervised = super().get_batch_samples(epoch_iterator, num_batches, device)
        lines = [line for batch in batches for line in batch.pop("lines").tolist()]
        tokens = sum(int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches)
        tokens -= lines.count(FILLER_LINE)
        lines = [line for line in lines if line != FILLER_LINE]
        if self.args.world_size > 1:
            tokens = int(self.accelerator.reduce(torch.tensor(tokens, device=device)))
        self.step_contents = StepContents(lines, tokens, int(num_supervised or 0))
        if batches and not self.step_contents.supervised_tokens:
            raise RunError(f"step {self.state.global_step + 1} has no supervised token, so no loss; {self._place()}")
        return batches, num_supervised

    # --- steps ---

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch."""
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.step_contents.loss += loss.detach()
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        clip: Callable[[nn.Module], Any] = super()._clip_grad_norm
        self.step_contents.grad_norm = clip(model)
        return self.step_contents.grad_norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Report to the trackers; a training step also leaves its row in the trajectory."""
        super().log(logs, *args, **kwargs)
        if "eval_loss" in logs:
            self.record({"type": "eval", "step": self.state.global_step, "eval_loss": logs["eval_loss"]})
        elif "grad_norm" in logs:
            self._record_step(self.state.global_step, logs["loss"], logs["grad_norm"])
            if self.target_loss is not None and logs["loss"] < self.target_loss:
                self.control.should_training_stop = True
                # as transformers does after the last step of all
                self.control.should_evaluate = self.args.eval_strategy != "no"
            # not after the log of an evaluation, whose time `evaluate` leaves out of the step
            self._step_began_s = time.perf_counter()

    def _record_step(self, step: int, loss: float, grad_norm: float) -> None:
        contents, now_s = self.step_contents, time.perf_counter()
        self.record(
            {
                "type": "step",
                "step": step,
                "loss": loss,
                "grad_norm": grad_norm,
                "clipped": bool(self.args.max_grad_norm) and grad_norm > self.args.max_grad_norm,
                "lr": contents.lr,
                "supervised_tokens": contents.supervised_tokens,
                "tokens": contents.tokens,
                "step_s": now_s - self._step_began_s,
                "peak_memory_bytes": peak_memory_bytes(),
            }
        )
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RunError(f"loss {loss} and gradient norm {grad_norm} at step {step}; {self._place()}")

    def _place(self) -> str:
        """Rows and last good checkpoint, for the message of a run that stops."""
        lines = sorted(set(self.step_contents.lines))
        shown = ", ".join(map(str, lines[:20])) + f" and {len(lines) - 20} more" * (len(lines) > 20)
        checkpoint = last_checkpoint(self.folder)
        return f"rows from line(s) {shown}; last good checkpoint: {checkpoint or 'none'}"

    # --- evaluation ---

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Mean loss over all supervised tokens of the held-out rows, in nats.

        Each row counts once, on any number of processes and in batches of any size.
        """
        began_s = time.perf_counter()
        model: Any = self.model_wrapped
        was_training = model.training
        model.eval()
        loss_sum, num_supervised = 0.0, 0
        try:
            # the loader draws a seed from the global generator, which training must not notice
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                for batch in self.get_eval_dataloader(eval_dataset):
                    batch.pop("lines")
                    row_nll = model(**self._prepare_inputs(batch), per_row=True).loss
                    row_supervised = (batch["labels"][:, 1:] != -100).sum(dim=1)
                    # gather_for_metrics drops the rows that were repeated to fill the last batch
                    row_nll, row_supervised = self.accelerator.gather_for_metrics((row_nll, row_supervised))
                    loss_sum += row_nll.double().sum().item()
                    num_supervised += int(row_supervised.sum())
        finally:
            model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": loss_sum / num_supervised}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._step_began_s += time.perf_counter() - began_s
        return metrics

    # --- checkpoints ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter whole, also from shards; transformers would gather the base too, or save no adapter."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        # imported here: it takes a second that no other run has to wait for
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        model: Any = self.model
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        self._save(output_dir, get_model_state_dict(model, options=whole))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._require_finite_weights(state_dict or {})
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.folder)
        # a pickle, of which config.yaml says the same in the open; and a form for a model card, with no answers
        for name in (_TRAINING_ARGS_PICKLE, _BLANK_CARD):
            (folder / name).unlink(missing_ok=True)
        self.write_beside(folder)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            complete_checkpoint(self.folder, self.state.global_step)
            # only now: transformers would do it before the new one can be relied upon
            drop_old_checkpoints(self.folder, self.keep_checkpoints)
        self._step_began_s = time.perf_counter()

    def _require_finite_weights(self, gathered: dict[str, Any]) -> None:
        """Save no weights that are not finite: the last update may have broken them after a finite loss."""
        model: Any = self.model
        # a parameter of a sharded model shows this process its own part only
        trained = {name: gathered.get(name, p) for name, p in model.named_parameters() if p.requires_grad}
        broken = [name for name, p in trained.items() if not bool(torch.isfinite(p).all())]
        if broken:
            raise RunError(
                f"{len(broken)} of {len(trained)} trained parameters are not finite after step "
                f"{self.state.global_step}, e.g. {broken[0]}; nothing was saved of them; last good checkpoint: "
                f"{last_checkpoint(self.folder) or 'none'}. A lower --learning_rate may help"
            )


class _StepGuard(TrainerCallback):
    """Looks at each step between backward and update, where ``Trainer`` has no method to override."""

    def __init__(self, trainer: SupervisedTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the epoch to the sampler."""
        # under several processes the epoch does not reach a sampler below accelerate's batch sampler shards
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the learning rate, and refuse a gradient that is not finite."""
        contents = self.trainer.step_contents
        contents.lr = kwargs["optimizer"].param_groups[0]["lr"]
        # stop before the update, so that the weights in memory stay those of the last good step
        if contents.grad_norm is not None and not math.isfinite(contents.grad_norm):
            loss = self.trainer.accelerator.reduce(torch.as_tensor(contents.loss), "mean")
            self.trainer._record_step(state.global_step + 1, float(loss), float(contents.grad_norm))


class ProgressBar(TrainerCallback):
    """One bar over the optimizer steps, with loss, gradient norm and rate; silent where stderr is no terminal."""

    bar: tqdm[Any] | None = None  # there is none when a trainer is only asked to evaluate

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where a resumed run goes on."""
        hidden = None if state.is_world_process_zero else True
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=hidden)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest figures."""
        if self.bar is None:
            return
        shown = {"loss": "loss", "grad_norm": "grad", "learning_rate": "lr", "eval_loss": "eval"}
        self.bar.set_postfix({shown[k]: f"{v:.4g}" for k, v in logs.items() if k in shown}, refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        if self.bar is not None:
            self.bar.close()


def peak_memory_bytes() -> int:
    """Most memory held so far: allocated on the CUDA device if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # on Windows; psutil is there wherever accelerate is
        psutil: Any = importlib.import_module("psutil")
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
