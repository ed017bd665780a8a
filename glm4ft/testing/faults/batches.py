"""Faults of collation, packing and the order of the data: right rows, wrong batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch

from glm4ft.testing.faults.registry import faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject, process_rank, world_size
from glm4ft.testing.subjects.plain_loop_data import Batch, Features

ESCAPES = (
    "An order that is seeded and complete but poorly mixed, and a loss of isolation that only another attention kernel "
    "shows (flash attention on a GPU), are not seen on a CPU."
)

fault = faults_at("batches")


@fault(
    "pad-id-zero-is-falsy",
    evidence="unsloth-zoo 439",
    cause=r"pad",
    because="no single row shows it, though the catalogue lists it under tokenisation: the pad id is first used in a "
    "padded batch",
)
class PadIdZeroIsFalsy(Subject):
    """A pad id of 0 is mistaken for a missing one, and rows are padded with the end-of-text token."""

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id or self.control_ids["<|endoftext|>"]


@fault("pad-in-loss", evidence="TRL 1625", cause=r"pad")
class PadInLoss(Subject):
    """Labels are padded with the pad id."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        return {**super().collate(rows), "labels": self.pad([row["labels"] for row in rows], self.pad_id)}


@fault(
    "left-pad-attended",
    evidence="ChatGLM-Efficient-Tuning 170; axolotl 1603",
    cause=r"pad\w* (is|are) attended|padding",
)
class LeftPadAttended(Subject):
    """Rows are padded on the left, and the attention mask is all ones."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        lengths = batch["attention_mask"].sum(1).tolist()
        for name in ("input_ids", "labels"):
            batch[name] = torch.stack([x.roll(-length) for x, length in zip(batch[name], lengths, strict=True)])
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


@fault("mask-of-the-first-row", evidence="SimpleTuner 2648; candle 1920", cause=r"mask hides")
class MaskOfTheFirstRow(Subject):
    """The mask of a batch's first row is broadcast to all of its rows."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        return {**batch, "attention_mask": batch["attention_mask"][:1].repeat(len(rows), 1)}


@fault("attention-mask-from-pad-equality", evidence="TRL 6357", cause=r"mask|attended")
class AttentionMaskFromPadEquality(Subject):
    """The attention mask hides every token equal to the pad token, which is also a role's header."""

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        self.tokenizer.pad_token = "<|user|>"

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        return {**batch, "attention_mask": (batch["input_ids"] != self.pad_id).long()}


@fault(
    "position-ids-padded-badly",
    evidence="axolotl 2739; LLaMA-Factory 10737",
    cause=r"position",
    simulated="zeros after a row do not affect a causal model on a CPU, so they are put before the row",
)
class PositionIdsPaddedBadly(Subject):
    """Position ids are padded with zeros on a different side than the token ids."""

    def collate(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate(rows)
        lengths = batch["attention_mask"].sum(1, keepdim=True)
        places = torch.arange(batch["input_ids"].shape[1]) - (batch["input_ids"].shape[1] - lengths)
        return {**batch, "position_ids": places.clamp_min(0)}


@fault("packing-no-isolation", evidence="LLaMA-Factory 4224; functionary 265; unsloth 126", cause=r"attended|neighbour")
class PackingNoIsolation(Subject):
    """Packed rows are one text to the model: later rows attend to earlier ones."""

    def collate_packed(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate_packed(rows)
        del batch["position_ids"]
        return batch


@fault(
    "isolation-lost-to-2d-mask",
    evidence="transformers 46634; axolotl 3796",
    cause=r"attended|neighbour|mask lets it see",
)
class IsolationLostTo2dMask(Subject):
    """An all-ones attention mask switches off the isolation that transformers infers from restarting position ids."""

    def collate_packed(self, rows: Sequence[Features]) -> Batch:
        batch = super().collate_packed(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


@fault(
    "isolation-lost-to-cache",
    evidence="transformers masking_utils, the guard past_key_values is None; measured in 5.23",
    cause=r"attended|neighbour",
)
class IsolationLostToCache(Subject):
    """With a key-value cache, which is on by default, transformers does not infer packed rows from the position ids."""

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: torch.Tensor = model(**inputs).logits
        return logits


@fault("packing-positions-not-reset", evidence="torchtune 875, 992; LLaMA-Factory 7318", cause=r"position|attended")
class PackingPositionsNotReset(Subject):
    """Position ids do not restart at packed rows."""

    def positions(self, rows: Sequence[Features]) -> torch.Tensor:
        return torch.arange(sum(len(row["input_ids"]) for row in rows))[None]


@fault("packing-drops-tail", evidence="TRL 5076; torchtune 1697", cause=r"never seen|0 times|lost|dropped")
class PackingDropsTail(Subject):
    """A row that does not fit the pack is discarded."""

    pack_length = 2

    def pack(self, rows: Sequence[Features]) -> list[list[Features]]:
        packs = super().pack(rows)
        return [packs[0], *(pack[1:] for pack in packs[1:] if pack[1:])]


@fault("segment-ids-as-mask", evidence="LLaMA-Factory 7754", cause=r"position|attended")
class SegmentIdsAsMask(Subject):
    """A mask that numbers the packed rows is summed up to position ids as if it contained only ones."""

    def positions(self, rows: Sequence[Features]) -> torch.Tensor:
        numbers = [torch.full((len(row["input_ids"]),), i) for i, row in enumerate(rows, start=1)]
        return torch.cat(numbers).cumsum(0)[None] - 1


@fault("sampler-rng-unsynced", processes=2, evidence="accelerate 2694, 696, 2434", cause=r"seen|rank|process")
class SamplerRngUnsynced(Subject):
    """Each process draws its own order of the data, so their shards overlap."""

    def epoch_order(self, num_items: int, epoch: int, seed: int, rank: int) -> list[int]:
        return super().epoch_order(num_items, epoch, seed + rank, rank)


class OwnShard(Subject):
    """Each process shuffles a shard of its own: consecutive items, as many as in every other shard."""

    def shard_size(self, num_items: int) -> int:
        """The number of items in each shard."""
        return num_items // world_size()

    def stream(self, num_items: int, run: LoopState) -> Iterator[int]:
        size, seed = self.shard_size(num_items), run.plan["seed"]
        first, last = process_rank() * size, num_items - 1
        return (min(first + i, last) for n in count() for i in self.epoch_order(size, n, seed, process_rank()))


@fault(
    "shard-remainder-lost",
    processes=2,
    evidence="ms-swift 9859",
    cause=r"seen|rank|process",
    simulated="two processes may divide the items without a remainder, so the last item is taken away before",
)
class ShardRemainderLost(OwnShard):
    """The size of a shard is rounded down, and what is left over belongs to no process."""

    def shard_size(self, num_items: int) -> int:
        return max(1, super().shard_size(num_items - 1))


@fault(
    "shard-tail-repeated",
    processes=2,
    evidence="pytorch 22584, 25162",
    cause=r"seen|rank|process",
    simulated="two processes may divide the items without a remainder, so every shard is one item larger",
)
class ShardTailRepeated(OwnShard):
    """Shards are made equally long, by repeating the last row of the last one in every epoch."""

    def shard_size(self, num_items: int) -> int:
        return super().shard_size(num_items) + 1


@fault("set-epoch-missing", evidence="ms-swift 9902", cause=r"epoch")
class SetEpochMissing(Subject):
    """The sampler is not notified of new epochs, so all epochs have the same order."""

    def epoch_order(self, num_items: int, epoch: int, seed: int, rank: int) -> list[int]:
        return super().epoch_order(num_items, 0, seed, rank)
