"""The part of the plain loop that computes losses, evaluates and generates.

Shapes: B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from glm4ft.data.encoded_row import IGNORED
from glm4ft.model.generation import greedy
from glm4ft.testing.subjects.plain_loop_data import Batch, Data, Features


class Evaluation(Data):
    """Computes loss and accuracy, and generates answers."""

    eval_batch_size = 4
    overrun = 16  # additional tokens that an answer may have before generation is cut off

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """The logits, of shape (B, T, V). With a cache, transformers would not infer packed rows from the positions."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the next tokens, in fp32, summed over supervised tokens."""
        predictions, targets = self.shift(logits, labels)
        return F.cross_entropy(predictions.float(), targets, ignore_index=IGNORED, reduction="sum")

    def shift(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction of each position and the label of the token after it, both flattened."""
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

    def evaluate(self, model: Any, conversations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Loss and accuracy over all supervised tokens, and the share of last answers that are reproduced exactly."""
        rows = [self.encode(c["messages"], c.get("tools")) for c in conversations]
        with self.evaluating(model):
            return {**self.score(model, rows), "exact": self.share_reproduced(model, conversations)}

    @contextmanager
    def evaluating(self, model: Any) -> Iterator[None]:
        """Context without dropout and gradients; the model's mode is restored at its end."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            model.train(was_training)

    def score(self, model: Any, rows: Sequence[Features]) -> dict[str, float]:
        """Loss and accuracy, summed over tokens and divided at the end, so that batching makes no difference."""
        loss, hits, num_targets = 0.0, 0, 0
        for batch in self.eval_batches(rows):
            logits = self.forward(model, batch)
            loss += float(self.loss_sum(logits, batch["labels"]))
            hits += self.count_hits(logits, batch["labels"])
            num_targets += int((batch["labels"][:, 1:] != IGNORED).sum())
        return {"loss": loss / num_targets, "accuracy": hits / num_targets}

    def eval_batches(self, rows: Sequence[Features]) -> Iterator[Batch]:
        """Batches of the rows, in their order."""
        for start in range(0, len(rows), self.eval_batch_size):
            yield self.collate(rows[start : start + self.eval_batch_size])

    def count_hits(self, logits: torch.Tensor, labels: torch.Tensor) -> int:
        """The number of supervised tokens that have the highest probability."""
        predictions, targets = self.shift(logits, labels)
        return int(((predictions.argmax(1) == targets) & (targets != IGNORED)).sum())

    def share_reproduced(self, model: Any, conversations: Sequence[Mapping[str, Any]]) -> float:
        """The share of conversations whose last answer is generated exactly from the messages before it."""
        prompts, answers = list[list[int]](), list[list[int]]()
        for conversation in conversations:
            messages, tools = list(conversation["messages"]), conversation.get("tools")
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            prompts.append(self.eval_prompt(messages, last, tools))
            answers.append(self.encode(messages[: last + 1], tools)["input_ids"][len(prompts[-1]) :])
        generated = self.answer_all(model, prompts, [len(answer) + self.overrun for answer in answers])
        return sum(got == answer for got, answer in zip(generated, answers, strict=True)) / len(answers)

    def answer_all(self, model: Any, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        """The ids generated from each prompt, one prompt after the other, with the limit of new tokens for each."""
        return [self.answer(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]

    def eval_prompt(self, messages: Sequence[Mapping[str, Any]], last: int, tools: Any) -> list[int]:
        """The prompt from which the answer at index ``last`` is generated."""
        return self.prompt(messages[:last], tools)

    def generate(self, model: Any, messages: Sequence[Mapping[str, Any]], tools: Any, max_new_tokens: int) -> list[int]:
        """Generate the next assistant turn by greedy decoding."""
        with self.evaluating(model):
            return self.answer(model, self.prompt(messages, tools), max_new_tokens)

    def answer(self, model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
        """The generated ids, up to and including a stop token."""
        return greedy(model, prompt, self.stop_ids, max_new_tokens)
