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


@variation("member-set-to-none")
class MemberSetToNone(Subject):
    """The pipeline has no evaluation of its own and says so with ``evaluate = None``."""

    evaluate: Any = None


@variation("second-pass-over-the-batch")
class SecondPassOverTheBatch(Subject):
    """Each step first runs its batch through the base alone, in training mode, as distillation from the base does."""

    def train_micro_batch(self, run: LoopState, batch: Batch, num_targets: int, num_micro_batches: int) -> torch.Tensor:
        with torch.no_grad(), run.model.disable_adapter():
            self.forward(run.wrapped, batch)
        return super().train_micro_batch(run, batch, num_targets, num_micro_batches)


@variation("evaluation-in-inference-mode")
class EvaluationInInferenceMode(Subject):
    """Evaluation and generation run in torch's inference mode, whose tensors no gradient can be computed from."""

    @contextlib.contextmanager
    def evaluating(self, model: Any) -> Iterator[None]:
        with super().evaluating(model), torch.inference_mode():
            yield


@variation("padding-token-of-its-own")
class PaddingTokenOfItsOwn(Subject):
    """Rows are padded with a stop token, whatever the tokenizer names, and masked by their lengths."""

    @property
    def pad_id(self) -> int:
        return int(self.stop_ids[-1])
