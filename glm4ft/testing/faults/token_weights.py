"""Faults of weights of single tokens in the loss, which a pipeline states and then applies in another way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject, sum_over_processes
from glm4ft.testing.subjects.plain_loop_data import Batch, Features

ESCAPES = (
    "What a weight should be is the pipeline's own statement: a flag in the data that becomes the wrong weight is not "
    "seen. Evaluations are expected to report the plain token mean."
)

gradient_fault = faults_at("gradient")


class Weighted(Subject):
    """The plain loop with weights of tokens: 1, 2 and 3 in turn."""

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Features:
        row = super().encode(messages, tools)
        return {**row, "weights": [1 + at % 3 for at in range(len(row["labels"]))]}

    def collate(self, rows: Sequence[Features]) -> Batch:
        return {**super().collate(rows), "weights": self.pad([row["weights"] for row in rows], 0)}

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        return super().forward(model, {name: tensor for name, tensor in batch.items() if name != "weights"})

    def train_micro_batch(self, run: LoopState, batch: Batch, num_targets: int, num_micro_batches: int) -> torch.Tensor:
        logits_TV, labels_T = self.shift(self.forward(run.wrapped, batch), batch["labels"])
        nll_T = F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED, reduction="none")
        loss = (nll_T * self.weights_of_targets(batch).flatten()).sum()
        self.backward(loss * self.loss_factor(batch, num_targets, num_micro_batches))
        return loss.detach() / num_targets

    def weights_of_targets(self, batch: Batch) -> torch.Tensor:
        """The weight (B, T - 1) of each predicted token."""
        return batch["weights"][:, 1:]

    def count_targets(self, batches: Sequence[Batch]) -> int:
        """The sum of the weights, by which the loss of the step is divided."""
        return int(sum_over_processes(torch.tensor(sum(self.sum_of_weights(batch) for batch in batches))))

    def sum_of_weights(self, batch: Batch) -> int:
        """The sum of the weights of the supervised tokens of a micro-batch."""
        return int((batch["weights"] * (batch["labels"] != IGNORED))[:, 1:].sum())


@gradient_fault("token-weights-ignored", evidence=MADE_UP, cause=r"weights of tokens are not applied")
class TokenWeightsIgnored(Weighted):
    """The weights are stated and collated, and the loss is that of equal tokens."""

    def weights_of_targets(self, batch: Batch) -> torch.Tensor:
        return torch.ones_like(batch["weights"][:, 1:])

    def sum_of_weights(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED)[:, 1:].sum())


@gradient_fault("token-weights-not-shifted", evidence=MADE_UP, cause=r"weights are not")
class TokenWeightsNotShifted(Weighted):
    """Labels are shifted and weights are not, so that each token has the weight of the one before it."""

    def weights_of_targets(self, batch: Batch) -> torch.Tensor:
        return batch["weights"][:, :-1]


@gradient_fault("token-weights-applied-twice", evidence=MADE_UP, cause=r"applied twice")
class TokenWeightsAppliedTwice(Weighted):
    """The collator scales by the weights, and the loss does so again."""

    def weights_of_targets(self, batch: Batch) -> torch.Tensor:
        return batch["weights"][:, 1:] ** 2


@gradient_fault("token-weights-mean-of-micro-means", evidence=MADE_UP, cause=r"micro-batch means")
class TokenWeightsMeanOfMicroMeans(Weighted):
    """Each micro-batch is divided by the sum of its own weights, and the quotients are averaged."""

    def loss_factor(self, batch: Batch, num_targets: int, num_micro_batches: int) -> float:
        return 1 / (max(1, self.sum_of_weights(batch)) * num_micro_batches)
