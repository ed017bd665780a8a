"""Legitimate practices of trainers that look unlike the plain loop from outside: no check may fail on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.faults.variations import variation
from glm4ft.testing.subjects.plain_loop import LoopState, Subject, sum_over_processes, trained, world_size
from glm4ft.testing.subjects.plain_loop_data import Batch, Features


@variation("ones-mask-on-right-padding")
class OnesMaskOnRightPadding(Subject):
    """The attention mask is all ones on right padding, which a causal model never attends to."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}


@variation("no-mask-on-right-padding")
class NoMaskOnRightPadding(Subject):
    """Right padding goes without an attention mask."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        return {name: tensor for name, tensor in super().collate(rows).items() if name != "attention_mask"}


@variation("gradients-in-a-buffer")
class GradientsInABuffer(Subject):
    """Each micro-batch's gradient is moved to a buffer beside ``grad``, as Megatron's ``main_grad``."""

    def train_micro_batch(self, run: LoopState, batch: Batch, num_targets: int, num_micro_batches: int) -> torch.Tensor:
        loss = super().train_micro_batch(run, batch, num_targets, num_micro_batches)
        for held in self._parameters(run):
            held.main_grad = held.grad if held.main_grad is None else held.main_grad + held.grad
            held.grad = None
        return loss

    def _parameters(self, run: LoopState) -> list[Any]:
        return list(trained(run.model))

    def zero_grad(self, run: LoopState) -> None:
        super().zero_grad(run)
        for held in self._parameters(run):
            held.main_grad = None

    def clip(self, run: LoopState) -> float:
        for held in self._parameters(run):
            held.grad = held.main_grad
        return super().clip(run)


class _Together:
    """Two optimizers behind the interface of one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Any:
        """The state of the optimizer that holds a parameter, by parameter."""
        return _States([optimizer.state for optimizer in self.optimizers])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of both."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        """Take the step of each."""
        for optimizer in self.optimizers:
            optimizer.step()


class _States:
    def __init__(self, states: Sequence[Any]) -> None:
        self.states = states

    def __getitem__(self, parameter: torch.Tensor) -> Any:
        return next((state for state in self.states if parameter in state), self.states[0])[parameter]


@variation("two-optimizers")
class TwoOptimizers(Subject):
    """The matrices A and the matrices B have an optimizer each, which step one after the other."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> Any:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        options = {"lr": plan["learning_rate"], "betas": tuple(plan["betas"]), "eps": plan["eps"]}
        return _Together(
            [
                torch.optim.AdamW([p for n, p in named if part in n], weight_decay=plan["weight_decay"], **options)
                for part in (".lora_A.", ".lora_B.")
            ]
        )

    def load_optimizer(self, run: LoopState, folder: Any) -> None:
        """Load the moments into the optimizer that holds each parameter."""
        together: Any = run.optimizer
        for optimizer in together.optimizers:
            part = LoopState(run.model, run.wrapped, optimizer, run.plan, run.rows)
            super().load_optimizer(part, folder)
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for parameter in [p for p in optimizer.state if id(p) not in held]:
                del optimizer.state[parameter]


class _CountingAdamW(torch.optim.AdamW):
    """AdamW that counts its steps and leaves the update to its parent."""

    num_steps = 0

    def step(self, closure: Any = None) -> Any:
        """Count, then update."""
        self.num_steps += 1
        return super().step(closure)


@variation("subclass-of-the-optimizer")
class SubclassOfTheOptimizer(Subject):
    """The optimizer is a subclass of AdamW that calls its parent's ``step``."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        groups = self.parameter_groups(model, plan)
        return _CountingAdamW(groups, lr=plan["learning_rate"], betas=tuple(plan["betas"]), eps=plan["eps"])


@variation("backward-in-a-closure")
class BackwardInAClosure(Subject):
    """Forward and backward pass run inside of ``optimizer.step(closure)``, as Lightning runs them."""

    def train_step(self, run: LoopState, batches: list[Batch]) -> dict[str, Any]:
        found = list[tuple[torch.Tensor, float]]()

        def closure() -> torch.Tensor:
            self.zero_grad(run)
            num_targets = self.count_targets(batches)
            losses = [self.train_micro_batch(run, batch, num_targets, len(batches)) for batch in batches]
            loss = torch.stack(losses).sum()
            found.append((loss, self.clip(run)))
            return loss

        self.set_rate(run)
        optimizer: Any = run.optimizer
        optimizer.step(closure)
        return self.log_entry(run, float(found[0][0]), found[0][1])


@variation("rows-shifted-in-the-batch")
class RowsShiftedInTheBatch(Subject):
    """Batches hold ids without the last and labels without the first, so that the loss shifts nothing."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        if not self.is_training:
            return super().collate(rows)
        lengths = [len(row["input_ids"]) - 1 for row in rows]
        return {
            "input_ids": self.pad([row["input_ids"][:-1] for row in rows], self.pad_id),
            "labels": self.pad([row["labels"][1:] for row in rows], IGNORED),
            "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long(),
        }

    def collate_packed(self, rows: Sequence[Features]) -> Batch:
        if not self.is_training:
            return super().collate_packed(rows)
        short = [{"input_ids": row["input_ids"][:-1], "labels": row["labels"][1:]} for row in rows]
        return super().collate_packed(short)

    is_training = False

    def train(self, model: Any, conversations: Any, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        self.is_training = True
        try:
            return super().train(model, conversations, plan)
        finally:
            self.is_training = False

    def count_targets(self, batches: Sequence[Batch]) -> int:
        own = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        return int(sum_over_processes(torch.tensor(own)))

    def shift(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_training:
            return super().shift(logits, labels)
        return logits.flatten(0, 1), labels.flatten()

    @contextlib.contextmanager
    def evaluating(self, model: Any) -> Iterator[None]:
        was, self.is_training = self.is_training, False
        with super().evaluating(model):
            try:
                yield
            finally:
                self.is_training = was


@variation("batch-shifted-after-padding")
class BatchShiftedAfterPadding(Subject):
    """Every batch is shifted once it is padded, in training and evaluation alike, so that the loss shifts nothing."""

    def shifted(self, batch: Batch) -> Batch:
        """The batch with each label at the position that predicts it."""
        return {name: tensor[:, 1:] if name == "labels" else tensor[:, :-1] for name, tensor in batch.items()}

    def collate(self, rows: Sequence[Features]) -> Batch:
        return self.shifted(super().collate(rows))

    def collate_packed(self, rows: Sequence[Features]) -> Batch:
        return self.shifted(super().collate_packed(rows))

    def count_targets(self, batches: Sequence[Batch]) -> int:
        own = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        return int(sum_over_processes(torch.tensor(own)))

    def shift(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits.flatten(0, 1), labels.flatten()


@variation("warm-up-above-zero")
class WarmUpAboveZero(Subject):
    """The first step of the warm-up already has a learning rate."""

    def rate_factor(self, step: int, plan: Mapping[str, Any]) -> float:
        warmup = int(plan["warmup_steps"])
        return (step + 1) / (warmup + 1) if step < warmup else super().rate_factor(step, plan)


@variation("gradients-cleared-after-the-step")
class GradientsClearedAfterTheStep(Subject):
    """Gradients are cleared after each update instead of before the next forward pass."""

    def zero_grad(self, run: LoopState) -> None:
        if not run.step:
            super().zero_grad(run)

    def update(self, run: LoopState) -> None:
        super().update(run)
        run.optimizer.zero_grad()


@variation("gradient-divided-after-accumulation")
class GradientDividedAfterAccumulation(Subject):
    """Losses are summed, and the accumulated gradient is divided by the number of targets before it is clipped."""

    num_targets = 1

    def loss_factor(self, batch: Batch, num_targets: int, num_micro_batches: int) -> float:
        if not num_targets:
            raise ValueError("no token of the step is supervised")
        self.num_targets = num_targets
        return float(world_size())

    def clip(self, run: LoopState) -> float:
        for parameter in trained(run.model):
            if parameter.grad is not None:
                parameter.grad /= self.num_targets
        return super().clip(run)


@variation("frozen-part-in-eval-mode")
class FrozenPartInEvalMode(Subject):
    """The frozen embedding stays in eval mode while the run trains."""

    def train_step(self, run: LoopState, batches: list[Batch]) -> dict[str, Any]:
        run.model.get_input_embeddings().eval()
        return super().train_step(run, batches)


@variation("rows-without-targets-left-out")
class RowsWithoutTargetsLeftOut(Subject):
    """Rows without any target are not trained on, which changes no gradient."""

    def items(self, rows: Sequence[Features], packing: bool) -> list[list[Features]]:
        kept = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
        if not kept:
            raise ValueError("no row has a target")
        return super().items(kept, packing)


@variation("fused-adamw")
class FusedAdamW(Subject):
    """AdamW updates all parameters in one fused kernel."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        groups, betas = self.parameter_groups(model, plan), tuple(plan["betas"])
        return torch.optim.AdamW(groups, lr=plan["learning_rate"], betas=betas, eps=plan["eps"], fused=True)


@variation("member-set-to-none")
class MemberSetToNone(Subject):
    """The pipeline has no evaluation of its own and says so with ``evaluate = None``."""

    evaluate: Any = None
