"""A plain torch training loop as a subject: no framework, and one small method for each part that can go wrong.

It is the example to start from when you put a trainer of your own on trial, and the healthy pipeline that every fault
of :mod:`glm4ft.testing.faults` overrides.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from glm4ft.data.encoded_row import IGNORED
from glm4ft.model.tiny_tokenizer import Architecture
from glm4ft.testing.subjects.plain_loop_data import Batch, Features
from glm4ft.testing.subjects.plain_loop_evaluation import Evaluation
from glm4ft.testing.subjects.plain_loop_model import Model

Conversations = Sequence[Mapping[str, Any]]


@dataclass
class LoopState:
    """The state of a training run.

    Args:
        model: The model with its LoRA adapters.
        wrapped: The same model, wrapped in DDP if there are several processes.
        optimizer: The optimizer of the trained parameters.
        plan: The plan that ``train`` received.
        rows: The encoded rows, used for training and for evaluation.
        step: The number of optimizer steps taken.
        log: The entries of all logged steps.
    """

    model: Any
    wrapped: Any
    optimizer: torch.optim.Optimizer
    plan: Mapping[str, Any]
    rows: list[Features]
    step: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)


class Subject(Evaluation, Model):
    """A training loop on a base folder.

    Args:
        base_dir: Hugging Face model folder.
    """

    name = "plain loop"
    distributed = True
    architecture: Architecture = "Glm4ForCausalLM"  # of the base on which the harness tries it

    # --- the loop ---

    def train(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Train the model in place according to the plan; returns the log."""
        run = self.begin(model, conversations, plan)
        windows = self.windows(run)
        while run.step < self.last_step(run):
            entry = self.train_step(run, next(windows))
            run.step += 1
            if plan["eval_every"] and run.step % plan["eval_every"] == 0:
                entry["eval_loss"] = self.evaluate_in_training(run)["loss"]
            if run.step % plan["log_every"] == 0:
                run.log.append(entry)
            if plan["save_every"] and run.step % plan["save_every"] == 0 and process_rank() == 0:
                self.save_checkpoint(run, Path(plan["output_dir"]) / f"checkpoint-{run.step}")
        return run.log

    def begin(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> LoopState:
        """Prepare a run: processes, seed, model, rows, optimizer and, when resuming, the checkpoint."""
        join_processes()
        torch.manual_seed(plan["seed"])
        if plan["gradient_checkpointing"]:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        rows = [self.encode(c["messages"], c.get("tools")) for c in conversations]
        run = LoopState(model, self.wrap(model), self.make_optimizer(model, plan), plan, rows)
        if plan["resume_from"]:
            self.resume(run, Path(plan["resume_from"]))
        return run

    def wrap(self, model: Any) -> Any:
        """Wrap the model so that gradients are averaged over processes, if there are several."""
        return DistributedDataParallel(model) if world_size() > 1 else model

    def last_step(self, run: LoopState) -> int:
        """The number of optimizer steps after which the run ends."""
        return int(run.plan["steps"])

    def windows(self, run: LoopState) -> Iterator[list[Batch]]:
        """The micro-batches that each optimizer step accumulates."""
        batches = self.batches(run)
        while True:
            yield list(islice(batches, run.plan["accumulation"]))

    def batches(self, run: LoopState) -> Iterator[Batch]:
        """The micro-batches of this process, epoch after epoch, starting at the run's current step."""
        size, packing = run.plan["micro_batch_size"], run.plan["packing"]
        items = self.items(run.rows, packing)
        stream = self.stream(len(items), run)
        if run.step:
            stream = self.skip_seen_items(stream, len(items), run)
        while True:
            yield self.batch((items[i] for i in islice(stream, size)), packing)

    def stream(self, num_items: int, run: LoopState) -> Iterator[int]:
        """Indices of this process's items; the processes take turns, so together they see each item once per epoch."""
        order = (i for epoch in count() for i in self.epoch_order(num_items, epoch, run.plan["seed"], process_rank()))
        return islice(order, process_rank(), None, world_size())

    def skip_seen_items(self, stream: Iterator[int], num_items: int, run: LoopState) -> Iterator[int]:
        """The stream without the items that a resumed run has already seen."""
        return islice(stream, run.step * run.plan["accumulation"] * run.plan["micro_batch_size"], None)

    def evaluate_in_training(self, run: LoopState) -> dict[str, float]:
        """Loss and accuracy on the training rows, in eval mode."""
        with self.evaluating(run.model):
            return self.score(run.model, run.rows)

    # --- one step ---

    def train_step(self, run: LoopState, batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step over several micro-batches; returns the entry for the log."""
        self.zero_grad(run)
        num_targets = self.count_targets(batches)
        losses = [self.train_micro_batch(run, batch, num_targets, len(batches)) for batch in batches]
        grad_norm = self.clip(run)
        self.set_rate(run)
        self.update(run)
        loss = float(sum_over_processes(torch.stack(losses).sum()))
        return self.log_entry(run, loss, grad_norm)

    def zero_grad(self, run: LoopState) -> None:
        """Clear the gradient of the last step."""
        run.optimizer.zero_grad()

    def count_targets(self, batches: Sequence[Batch]) -> int:
        """The number of supervised tokens of the step, over all its micro-batches and processes."""
        own = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        return int(sum_over_processes(torch.tensor(own)))

    def train_micro_batch(self, run: LoopState, batch: Batch, num_targets: int, num_micro_batches: int) -> torch.Tensor:
        """Run forward and backward pass; returns this micro-batch's part of the step's loss."""
        loss = self.loss_sum(self.forward(run.wrapped, batch), batch["labels"])
        self.backward(loss * self.loss_factor(batch, num_targets, num_micro_batches))
        return loss.detach() / num_targets

    def loss_factor(self, batch: Batch, num_targets: int, num_micro_batches: int) -> float:
        """The factor that makes the summed loss a mean over the step's tokens, after DDP averages over processes."""
        return world_size() / num_targets

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of the loss to that of the parameters."""
        loss.backward()

    def clip(self, run: LoopState) -> float:
        """Clip the gradient to the plan's global norm; returns the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(trained(run.model), run.plan["max_grad_norm"] or math.inf)
        return float(norm)

    def update(self, run: LoopState) -> None:
        """Take the optimizer step."""
        run.optimizer.step()

    def log_entry(self, run: LoopState, loss: float, grad_norm: float) -> dict[str, Any]:
        """The log entry of a step: number, loss, gradient norm and learning rate."""
        rate = run.optimizer.param_groups[0]["lr"]
        return {"step": run.step + 1, "loss": loss, "grad_norm": grad_norm, "learning_rate": rate}

    # --- optimizer and schedule ---

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        """AdamW with the plan's settings on the trained parameters."""
        groups = self.parameter_groups(model, plan)
        return torch.optim.AdamW(groups, lr=plan["learning_rate"], betas=tuple(plan["betas"]), eps=plan["eps"])

    def parameter_groups(self, model: Any, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: one group, since all LoRA matrices have the same weight decay."""
        return [{"params": trained(model), "weight_decay": plan["weight_decay"]}]

    def set_rate(self, run: LoopState) -> None:
        """Set the learning rate for the step that the optimizer is about to take."""
        for group in run.optimizer.param_groups:
            group["lr"] = run.plan["learning_rate"] * self.rate_factor(run.step, run.plan)

    def rate_factor(self, step: int, plan: Mapping[str, Any]) -> float:
        """Fraction of the peak learning rate after ``step`` steps: linear warm-up from 0, then the schedule's shape."""
        warmup = int(plan["warmup_steps"])
        if step < warmup:
            return step / warmup
        done = (step - warmup) / max(1, self.horizon(plan) - warmup)
        shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return shapes[str(plan["schedule"])]

    def horizon(self, plan: Mapping[str, Any]) -> int:
        """The step at which a decaying schedule reaches 0."""
        return int(plan["steps"])

    # --- checkpoints: safetensors and JSON, so that reading one cannot run code ---

    def save_checkpoint(self, run: LoopState, folder: Path) -> None:
        """Write everything that a resumed run needs to equal an uninterrupted one."""
        self.save(run.model, str(folder))
        save_file(self.optimizer_state(run), folder / "optimizer.safetensors")
        save_file({"torch": torch.get_rng_state()}, folder / "rng.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": run.step}), "utf-8")

    def resume(self, run: LoopState, folder: Path) -> None:
        """Restore adapters, optimizer, random state and step from a checkpoint."""
        self.load_weights(run.model, folder)
        self.load_optimizer(run, folder)
        torch.set_rng_state(load_file(folder / "rng.safetensors")["torch"])
        run.step = json.loads((folder / "state.json").read_text("utf-8"))["step"]

    def load_weights(self, model: Any, folder: Path) -> None:
        """Load the adapters of a checkpoint into a model that is already built."""
        model.load_adapter(str(folder), "default", is_trainable=True)

    def optimizer_state(self, run: LoopState) -> dict[str, torch.Tensor]:
        """AdamW's moments and step counts, by name of the parameter and of the entry."""
        states = [(name, run.optimizer.state[p]) for name, p in run.model.named_parameters() if p.requires_grad]
        return {f"{name}/{key}": value for name, state in states for key, value in state.items()}

    def load_optimizer(self, run: LoopState, folder: Path) -> None:
        """Restore AdamW's moments and step counts from a checkpoint."""
        parameters = dict(run.model.named_parameters())
        for key, value in load_file(folder / "optimizer.safetensors").items():
            name, entry = key.rsplit("/", 1)
            run.optimizer.state[parameters[name]][entry] = value


def trained(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def join_processes() -> None:
    """Join the process group, if torchrun or the harness started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def process_rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, available on each of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
