"""The half of the plain loop that scores and generates: what training and evaluation have in common, and evaluation.

Shapes: B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from glm4ft.data.chat_format import IGNORED
from glm4ft.model.generation import greedy
from glm4ft.testing.subjects.plain_loop_data import Batch, Data, Features


class Evaluation(Data):
    """Loss, accuracy and generation."""

    eval_batch_size = 4
    overrun = 16  # tokens that a turn which does not stop is given before it is cut off

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """(B, T, V) logits. With a cache, transformers would not look for packed rows in the positions."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the next tokens, in fp32, summed over the supervised ones."""
        predictions, targets = self.shift(logits, labels)
        return F.cross_entropy(predictions.float(), targets, ignore_index=IGNORED, reduction="sum")

    def shift(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each position's prediction beside the token that follows it."""
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

    def evaluate(self, model: Any, conversations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Loss and accuracy over all supervised tokens, and the share of last answers that come back word by word."""
        rows = [self.encode(c["messages"], c.get("tools")) for c in conversations]
        with self.evaluating(model):
            exact = [self.answers_exactly(model, conversation) for conversation in conversations]
            return {**self.score(model, rows), "exact": sum(exact) / len(exact)}

    @contextmanager
    def evaluating(self, model: Any) -> Iterator[None]:
        """Without dropout and gradients; the model's mode is put back."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            model.train(was_training)

    def score(self, model: Any, rows: Sequence[Features]) -> dict[str, float]:
        """Loss and accuracy, each a sum over tokens divided at the end, so that batches do not matter."""
        loss, hits, num_targets = 0.0, 0, 0
        for batch in self.eval_batches(rows):
            logits = self.forward(model, batch)
            loss += float(self.loss_sum(logits, batch["labels"]))
            hits += self.count_hits(logits, batch["labels"])
            num_targets += int((batch["labels"][:, 1:] != IGNORED).sum())
        return {"loss": loss / num_targets, "accuracy": hits / num_targets}

    def eval_batches(self, rows: Sequence[Features]) -> Iterator[Batch]:
        """The rows in order."""
        for start in range(0, len(rows), self.eval_batch_size):
            yield self.collate(rows[start : start + self.eval_batch_size])

    def count_hits(self, logits: torch.Tensor, labels: torch.Tensor) -> int:
        """Supervised tokens that are the likeliest."""
        predictions, targets = self.shift(logits, labels)
        return int(((predictions.argmax(1) == targets) & (targets != IGNORED)).sum())

    def answers_exactly(self, model: Any, conversation: Mapping[str, Any]) -> bool:
        """Whether a conversation's last answer is generated from what stands before it."""
        messages, tools = list(conversation["messages"]), conversation.get("tools")
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        prompt = self.eval_prompt(messages, last, tools)
        answer = self.encode(messages[: last + 1], tools)["input_ids"][len(prompt) :]
        return self.answer(model, prompt, len(answer) + self.overrun) == answer

    def eval_prompt(self, messages: Sequence[Mapping[str, Any]], last: int, tools: Any) -> list[int]:
        """What the answer at index ``last`` is generated from."""
        return self.prompt(messages[:last], tools)

    def generate(self, model: Any, messages: Sequence[Mapping[str, Any]], tools: Any, max_new_tokens: int) -> list[int]:
        """The next assistant turn, by greedy decoding."""
        with self.evaluating(model):
            return self.answer(model, self.prompt(messages, tools), max_new_tokens)

    def answer(self, model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
        """New ids, up to and including a stop token."""
        return greedy(model, prompt, self.stop_ids, max_new_tokens)
