"""Faults that only a long row shows: every batch that is short enough is right."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.subjects.plain_loop_data import Batch

ESCAPES = "What begins beyond the 2,100 tokens of the longest row that is trained is not seen."

CHUNK = 1024  # positions


@faults_at("gradient")(
    "chunk-means-added", evidence="NeMo AutoModel 3803", cause=r"means over chunks of positions are added"
)
class ChunkMeansAdded(Subject):
    """A loss that is computed in chunks to save memory adds up the means of its chunks."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        predictions, targets = self.shift(logits, labels)
        chunks = zip(predictions.split(CHUNK), targets.split(CHUNK), strict=True)
        means = [F.cross_entropy(p.float(), t) for p, t in chunks if (t != IGNORED).any()]
        return torch.stack(means).sum() * (targets != IGNORED).sum()


@faults_at("rows")("last-chunk-has-no-loss", evidence=MADE_UP, cause=r"not trained that should be")
class LastChunkHasNoLoss(Subject):
    """A loss in chunks of equal size leaves out what is behind the last whole chunk."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        predictions, targets = self.shift(logits, labels)
        whole = len(targets) // CHUNK * CHUNK or len(targets)
        return F.cross_entropy(predictions[:whole].float(), targets[:whole], ignore_index=IGNORED, reduction="sum")


@faults_at("rows")("loss-on-the-first-positions", evidence="aprender 2250", cause=r"not trained that should be")
class LossOnTheFirstPositions(Subject):
    """The loss has a limit of its own, 512 positions, that the rows know nothing of."""

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss_sum(logits[:, :512], labels[:, :512])


@faults_at("model")("attention-window", evidence=MADE_UP, cause=r"how far attention reaches")
class AttentionWindow(Subject):
    """A token attends to the 1,024 tokens before it only, as in the configuration of another model."""

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        num_rows, length = batch["input_ids"].shape
        if length <= CHUNK or "position_ids" in batch:
            return super().forward(model, batch)
        at_T = torch.arange(length)
        distance_TT = at_T[:, None] - at_T
        is_seen_TT = (distance_TT >= 0) & (distance_TT < CHUNK)
        bias_TT = torch.zeros(length, length).masked_fill(~is_seen_TT, torch.finfo(torch.float32).min)
        mask = bias_TT.expand(num_rows, 1, length, length)
        logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
        return logits


@faults_at("batches")(
    "positions-interpolated", evidence="Pai-Megatron-Patch 560", cause=r"positions do not count",
    because="the positions are an input of the model",
)  # fmt: skip
class PositionsInterpolated(Subject):
    """The positions of a row over 1,024 tokens are scaled down to that range, as for a context that was extended."""

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        num_rows, length = batch["input_ids"].shape
        if length > CHUNK and "position_ids" not in batch:
            positions = torch.arange(length) * (CHUNK / length)
            batch = {**batch, "position_ids": positions.expand(num_rows, length)}
        return super().forward(model, batch)
