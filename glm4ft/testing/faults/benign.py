"""Healthy variations of the plain loop that change numbers or methods: the suite must raise no alarm on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from glm4ft.data.conversation import Message
from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.faults.variations import variation
from glm4ft.testing.recording.discovery import decoder_of
from glm4ft.testing.subjects.plain_loop import Conversations, LoopState, Subject, trained, world_size
from glm4ft.testing.subjects.plain_loop_data import Batch, Features


@variation("healthy", processes=2)
class Healthy(Subject):
    """The plain loop without changes; the first gradient of every A is zero, since B is zero."""


@variation("packed-positions-running-with-block-mask")
class RunningPositionsWithBlockMask(Subject):
    """Position ids do not restart at packed rows, which an explicit block mask keeps apart."""

    def collate_packed(self, rows: Sequence[Features]) -> Batch:
        numbers = torch.cat([torch.full((len(row["input_ids"]),), i) for i, row in enumerate(rows)])
        mask = (numbers[:, None] == numbers) & torch.ones(len(numbers), len(numbers), dtype=torch.bool).tril()
        batch = super().collate_packed(rows)
        return {**batch, "attention_mask": mask[None, None], "position_ids": torch.arange(len(numbers))[None]}


@variation("attention-implementation")
class EagerAttention(Subject):
    """Attention uses the eager implementation instead of SDPA."""

    def load_base(self, base_dir: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32, attn_implementation="eager")


@variation("batch-split")
class BatchSplit(Subject):
    """Every micro-batch is split into batches of one row."""

    def train(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        split = {"micro_batch_size": 1, "accumulation": plan["accumulation"] * plan["micro_batch_size"]}
        return super().train(model, conversations, {**plan, **split})


@variation("merge-rounding")
class MergeRounding(Subject):
    """The merged checkpoint is written in bf16."""

    def merged(self, model: Any) -> Any:
        return super().merged(model).to(torch.bfloat16)


@variation("other-seed")
class OtherSeed(Subject):
    """Adapters and the order of the data are drawn from other seeds than the plan's."""

    shift_of_seed = 1000

    def build_model(self, base_dir: str, seed: int) -> Any:
        return super().build_model(base_dir, seed + self.shift_of_seed)

    def epoch_order(self, num_items: int, epoch: int, seed: int, rank: int) -> list[int]:
        return super().epoch_order(num_items, epoch, seed + self.shift_of_seed, rank)


@variation("two-threads")
class TwoThreads(Subject):
    """The run uses two threads."""

    def train(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return super().train(model, conversations, plan)
        finally:
            torch.set_num_threads(before)


@variation("padding-to-multiple")
class PaddingToMultiple(Subject):
    """Batches are padded to a multiple of eight."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        missing = -batch["input_ids"].shape[1] % 8
        fill = {"input_ids": self.pad_id, "labels": IGNORED, "attention_mask": 0}
        return {name: F.pad(batch[name], (0, missing), value=value) for name, value in fill.items()}


@variation("left-padding")
class LeftPadding(Subject):
    """Batches are padded on the left, with matching attention mask and position ids."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        lengths = batch["attention_mask"].sum(1).tolist()
        width = batch["input_ids"].shape[1]
        rolled = {
            name: torch.stack([x.roll(width - length) for x, length in zip(tensor, lengths, strict=True)])
            for name, tensor in batch.items()
        }
        return {**rolled, "position_ids": (rolled["attention_mask"].cumsum(1) - 1).clamp_min(0)}


@variation("rows-by-length")
class RowsByLength(Subject):
    """In the shuffled order, each pair of adjacent rows is sorted, as when batching by length."""

    def epoch_order(self, num_items: int, epoch: int, seed: int, rank: int) -> list[int]:
        order = super().epoch_order(num_items, epoch, seed, rank)
        pairs = [order[i : i + 2] for i in range(0, num_items, 2)]
        return list(chain.from_iterable(sorted(pair, reverse=True) for pair in pairs))


@variation("sparse-log")
class SparseLog(Subject):
    """Only every third step is logged, whatever the plan requests."""

    def train(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        return super().train(model, conversations, {**plan, "log_every": 3})


@variation("always-checkpointing")
class AlwaysCheckpointing(Subject):
    """Activations are recomputed, whether or not the plan requests it."""

    def train(self, model: Any, conversations: Conversations, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        return super().train(model, conversations, {**plan, "gradient_checkpointing": True})


@variation("supervised-rows-only")
class SupervisedRowsOnly(Subject):
    """The head is applied to supervised positions only."""

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        if not model.training or model is not getattr(model, "module", model):
            return super().forward(model, batch)  # an evaluation needs all logits, a wrapper its own forward
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        hidden = decoder_of(model).body(**inputs, use_cache=False).last_hidden_state
        keep = F.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
        logits: torch.Tensor = model.base_model.model.lm_head(hidden[keep])
        return logits

    def shift(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if logits.dim() == 3:
            return super().shift(logits, labels)
        targets = labels[:, 1:].flatten()
        return logits, targets[targets != IGNORED]


@variation("clipping-by-hand")
class ClippingByHand(Subject):
    """The gradient is clipped without ``torch.nn.utils.clip_grad_norm_``."""

    def clip(self, run: LoopState) -> float:
        parameters, limit = trained(run.model), run.plan["max_grad_norm"]
        norm = float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())
        for parameter in parameters:
            if parameter.grad is not None and limit and not norm <= limit:
                parameter.grad *= limit / norm
        return norm


@variation("groups-of-parameters")
class GroupsOfParameters(Subject):
    """The matrices A and B are two parameter groups with the same settings."""

    def parameter_groups(self, model: Any, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in named if part in name], "weight_decay": plan["weight_decay"]}
            for part in (".lora_A.", ".lora_B.")
        ]


@variation("one-tensor-at-a-time")
class OneTensorAtATime(Subject):
    """AdamW updates the parameters one after the other."""

    def make_optimizer(self, model: Any, plan: Mapping[str, Any]) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer(model, plan)
        for group in optimizer.param_groups:
            group["foreach"] = False
        return optimizer


@variation("loss-scaling")
class LossScaling(Subject):
    """The loss is scaled for half precision, and the gradient unscaled before it is clipped."""

    factor = 2.0**16

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss * self.factor)

    def clip(self, run: LoopState) -> float:
        for parameter in trained(run.model):
            if parameter.grad is not None:
                parameter.grad /= self.factor
        return super().clip(run)


@variation("end-of-text")
class EndOfText(Subject):
    """The last answer of a conversation ends with the end-of-text token."""

    def final_stop(self, message: Message) -> str:
        return "<|endoftext|>"


@variation("large-evaluation-batches")
class LargeEvaluationBatches(Subject):
    """Evaluation uses one batch of all rows, ordered by length."""

    def eval_batches(self, rows: Sequence[Features]) -> Iterator[Batch]:
        yield self.collate(sorted(rows, key=lambda row: len(row["input_ids"])))


@variation("scaled-by-token-mean", processes=2)
class ScaledByTokenMean(Subject):
    """Each micro-batch's mean loss is weighted by its share of the step's supervised tokens."""

    def loss_factor(self, batch: Batch, num_targets: int, num_micro_batches: int) -> float:
        own = int((batch["labels"][:, 1:] != IGNORED).sum())
        return 1 / max(own, 1) * (own / num_targets) * world_size()


@variation("embeddings-handed-over")
class EmbeddingsHandedOver(Subject):
    """The loop looks embeddings up and hands them to the model, as loops do that add noise or images to them."""

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "input_ids")}
        embeddings = self.embedding_of(model)(batch["input_ids"])
        logits: torch.Tensor = model(inputs_embeds=embeddings, **inputs, use_cache=False).logits
        return logits

    def embedding_of(self, model: Any) -> torch.nn.Module:
        """The embedding of a model, wrapped for several processes or not."""
        found: torch.nn.Module = getattr(model, "module", model).get_input_embeddings()
        return found
