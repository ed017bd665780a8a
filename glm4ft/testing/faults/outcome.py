"""Faults of evaluation and generation: training is right, but the reported figures or the generated text are not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from glm4ft.data.control_tokens import PREFIX
from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject
from glm4ft.testing.subjects.plain_loop_data import Batch, Features

ESCAPES = (
    "Metrics other than loss, token accuracy and exact answers (BLEU, a judge's score), and sampling other than greedy "
    "decoding, are not judged."
)
PROMPT_LIMIT = 64

fault = faults_at("outcome")


@fault(
    "eval-prompt-leaks-answer", evidence="GLM-4 finetune.py process_batch_eval, combine branch", cause=r"answer|leak"
)
class EvalPromptLeaksAnswer(Subject):
    """The evaluation generates from the whole conversation, the answer included."""

    def eval_prompt(self, messages: Sequence[Mapping[str, Any]], last: int, tools: Any) -> list[int]:
        return self.encode(messages[: last + 1], tools)["input_ids"]


@fault(
    "eval-prompt-cuts-question",
    evidence="GLM-4 finetune.py, input_ids[:max_input_length] + header",
    cause=r"\bcut\b|question|prompt",
)
class EvalPromptCutsQuestion(Subject):
    """A long prompt is cut at its end, where the question is, before the assistant's header is appended."""

    def eval_prompt(self, messages: Sequence[Mapping[str, Any]], last: int, tools: Any) -> list[int]:
        prompt = super().eval_prompt(messages, last, tools)
        return [*prompt[:-1][:PROMPT_LIMIT], prompt[-1]]


@fault("eval-loss-divided-by-accumulation", evidence="LLaMA-Factory 6465", cause=r"accumulation|divided|times")
class EvalLossDividedByAccumulation(Subject):
    """The loss of an evaluation is divided by the number of micro-batches, as in training."""

    def evaluate_in_training(self, run: LoopState) -> dict[str, float]:
        figures = super().evaluate_in_training(run)
        return {**figures, "loss": figures["loss"] / run.plan["accumulation"]}


@fault("eval-tail-duplicates", evidence="accelerate 578, 982", cause=r"twice|duplicate|batch|last")
class EvalTailDuplicates(Subject):
    """The last batch of an evaluation is filled up with the first rows, which then count twice."""

    def eval_batches(self, rows: Sequence[Features]) -> Iterator[Batch]:
        missing = -len(rows) % self.eval_batch_size
        return super().eval_batches([*rows, *rows[:missing]])


@fault("metric-not-shifted", evidence="TRL 5620, 3821", cause=r"accuracy")
class MetricNotShifted(Subject):
    """Accuracy compares each prediction with the token at its own position."""

    def count_hits(self, logits: torch.Tensor, labels: torch.Tensor) -> int:
        return int(((logits.argmax(2) == labels) & (labels != IGNORED)).sum())


@fault("generation-prompt-missing", evidence="axolotl 2019; TRL 1532", cause=r"header|<\|assistant\|>|prompt")
class GenerationPromptMissing(Subject):
    """The prompt lacks the header of the turn to generate."""

    def generate(self, model: Any, messages: Sequence[Mapping[str, Any]], tools: Any, max_new_tokens: int) -> list[int]:
        with self.evaluating(model):
            return self.answer(model, self.prompt(messages, tools)[:-1], max_new_tokens)


@fault("inference-double-prefix", evidence="Soup 781; sglang 888; open-r1 462", cause=r"prefix|prompt")
class InferenceDoublePrefix(Subject):
    """Tokenising the rendered prompt adds the prefix a second time."""

    def generate(self, model: Any, messages: Sequence[Mapping[str, Any]], tools: Any, max_new_tokens: int) -> list[int]:
        prefix = [self.control_ids[token] for token in PREFIX]
        with self.evaluating(model):
            return self.answer(model, prefix + self.prompt(messages, tools), max_new_tokens)


@fault("new-token-limit-miscounted", evidence="transformers 23723 (TrainCheck set)", cause=r"limit|new tokens|tokens")
class NewTokenLimitMiscounted(Subject):
    """The limit of new tokens also counts the prompt, so answers to long prompts are cut."""

    def answer(self, model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
        return super().answer(model, prompt, max(1, max_new_tokens - len(prompt)))


@fault("perplexity-for-the-loss", evidence=MADE_UP, cause=r"the perplexity is reported")
class PerplexityForTheLoss(Subject):
    """The evaluation reports the perplexity under the name of the loss."""

    def score(self, model: Any, rows: Sequence[Features]) -> dict[str, float]:
        scores = super().score(model, rows)
        return {**scores, "loss": math.exp(scores["loss"])}
