"""Faults of what users vary: spellings of a loss flag, sizes of a batch, packing, resuming, lengths of a row."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

import torch
import torch.nn.functional as F

from glm4ft.data.conversation import Conversation, Message
from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject
from glm4ft.testing.subjects.plain_loop_data import Features

ESCAPES = (
    "A spelling, a size or a length that no check tries may be handled wrongly: flags other than booleans, numbers, "
    "null and words, and rows that are longer than the probed limit."
)

rows_fault = faults_at("rows")
batches_fault = faults_at("batches")
persistence_fault = faults_at("persistence")
outcome_fault = faults_at("outcome")


class OtherFlags(Subject):
    """A pipeline that reads the ``loss`` flag of a message in a way of its own."""

    def taken(self, flag: Any) -> Any:
        """The flag that the pipeline makes of a flag."""
        raise NotImplementedError

    def read(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> Conversation:
        given = [{**m, "loss": self.taken(m["loss"])} if "loss" in m else m for m in messages]
        return super().read(given, tools)


@rows_fault("flag-zero-is-trained", evidence=MADE_UP, cause=r"\bloss\b.*(\b0|flag)|should be ignored")
class FlagZeroIsTrained(OtherFlags):
    """The loss flag is compared with ``False`` by identity, so an answer with the flag 0 is trained."""

    def taken(self, flag: Any) -> Any:
        return flag is not False if isinstance(flag, int | float) else flag


@rows_fault("flag-word-false-is-true", evidence=MADE_UP, cause=r"\bloss\b.*(false|flag)|should be ignored")
class FlagWordFalseIsTrue(OtherFlags):
    """The loss flag is tested for truth, so an answer with the word "false" as its flag is trained."""

    def taken(self, flag: Any) -> Any:
        return bool(flag) if isinstance(flag, str) else flag


@rows_fault("flag-none-takes-targets-away", evidence=MADE_UP, cause=r"\bloss\b.*(None|null|flag)|should be supervised")
class FlagNoneTakesTargetsAway(OtherFlags):
    """A loss flag of null, which columnar data sets add where there was none, removes an answer from the targets."""

    def taken(self, flag: Any) -> Any:
        return False if flag is None else flag


@rows_fault("flag-one-is-not-true", evidence=MADE_UP, cause=r"\bloss\b.*(\b1|flag)|should be supervised")
class FlagOneIsNotTrue(OtherFlags):
    """Only a loss flag of ``True`` marks a target, not 1, which is what OpenAI's ``weight`` uses."""

    def taken(self, flag: Any) -> Any:
        return flag if flag is None or isinstance(flag, bool) else False


@rows_fault(
    "reasoning-of-earlier-turns-stripped",
    evidence="LLaMA-Factory 9083",
    cause=r"think|reasoning|change when more follows|does not stand",
)
class ReasoningOfEarlierTurnsStripped(Subject):
    """The reasoning between its tags is removed from all answers but the last."""

    def ordered(self, messages: Sequence[Message]) -> list[Message]:
        last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
        return super().ordered(
            [
                replace(message, content=re.sub(r"<think>.*?</think>", "", message.content, flags=re.DOTALL))
                if message.role == "assistant" and i != last
                else message
                for i, message in enumerate(messages)
            ]
        )


@rows_fault("row-over-the-limit-is-cut", evidence=MADE_UP, cause=r"\bcut\b|length|tokens")
class RowOverTheLimitIsCut(Subject):
    """A row longer than the documented limit of 8,192 tokens is cut there without a message."""

    max_length = 8192

    def fit(self, row: Features) -> Features:
        return {name: values[: self.max_length] for name, values in row.items()}


@batches_fault(
    "rows-behind-the-last-window-dropped",
    evidence=MADE_UP,
    cause=r"never seen|not seen|dropped|left out|another 0 times",
)
class RowsBehindTheLastWindowDropped(Subject):
    """In every epoch, the shuffled rows that do not fill an accumulation window are dropped."""

    def stream(self, num_items: int, run: LoopState) -> Iterator[int]:
        window = run.plan["micro_batch_size"] * run.plan["accumulation"]
        kept = max(1, num_items // window) * window
        for epoch in count():
            yield from self.epoch_order(num_items, epoch, run.plan["seed"], 0)[:kept]


@batches_fault("last-window-filled-with-first-rows", evidence=MADE_UP, cause=r"twice|repeat")
class LastWindowFilledWithFirstRows(Subject):
    """In every epoch, the last accumulation window is filled up with the epoch's first rows, which are seen twice."""

    def stream(self, num_items: int, run: LoopState) -> Iterator[int]:
        window = run.plan["micro_batch_size"] * run.plan["accumulation"]
        missing = -num_items % window if num_items > window else 0
        for epoch in count():
            order = self.epoch_order(num_items, epoch, run.plan["seed"], 0)
            yield from order + order[:missing]


@persistence_fault(
    "resume-forgets-accumulation", evidence="transformers 5605, 8624; sd-scripts 2425", cause=r"other rows"
)
class ResumeForgetsAccumulation(Subject):
    """A resumed run skips one micro-batch for each step that was taken, however many a step has."""

    def skip_seen_items(self, stream: Iterator[int], num_items: int, run: LoopState) -> Iterator[int]:
        return islice(stream, run.step * run.plan["micro_batch_size"], None)


@persistence_fault("resume-counts-rows-of-packs", evidence=MADE_UP, cause=r"other rows")
class ResumeCountsRowsOfPacks(Subject):
    """With packing, a resumed run skips as many packs as rows were seen, though a pack holds several rows."""

    pack_length = 2

    def skip_seen_items(self, stream: Iterator[int], num_items: int, run: LoopState) -> Iterator[int]:
        seen = super().skip_seen_items(stream, num_items, run)
        per_pack = math.ceil(len(run.rows) / num_items)
        window = run.plan["accumulation"] * run.plan["micro_batch_size"]
        return islice(seen, run.step * window * (per_pack - 1), None)


@outcome_fault("evaluation-of-packs-averages-packs", evidence=MADE_UP, cause=r"\bmeans? of\b")
class EvaluationOfPacksAveragesPacks(Subject):
    """With packing, the loss of an evaluation is the mean of the packs' means."""

    pack_length = 2

    def evaluate_in_training(self, run: LoopState) -> dict[str, float]:
        if not run.plan["packing"]:
            return super().evaluate_in_training(run)
        with self.evaluating(run.model):
            figures = [self.score(run.model, pack) for pack in self.pack(run.rows)]
        return {name: sum(f[name] for f in figures) / len(figures) for name in ("loss", "accuracy")}


@outcome_fault("evaluation-drops-the-uneven-batch", evidence=MADE_UP, cause=r"left out|dropped")
class EvaluationDropsTheUnevenBatch(Subject):
    """An evaluation during training uses the training batch size and drops the rows that do not fill a batch."""

    def evaluate_in_training(self, run: LoopState) -> dict[str, float]:
        size = run.plan["micro_batch_size"]
        with self.evaluating(run.model):
            return self.score(run.model, run.rows[: max(1, len(run.rows) // size) * size])


@outcome_fault("batched-generation-padded-right", evidence="transformers 31672, 26569", cause=r"\bpadd(ed|ing)\b")
class BatchedGenerationPaddedRight(Subject):
    """An evaluation generates all answers in one batch of prompts padded on the right, and continues the padding."""

    def answer_all(self, model: Any, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        ids = self.pad(prompts, self.pad_id)
        mask, start = self.pad([[1] * len(prompt) for prompt in prompts], 0), ids.shape[1]
        for _ in range(max(limits)):
            best = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].argmax(-1)
            ids, mask = torch.cat([ids, best[:, None]], 1), F.pad(mask, (0, 1), value=1)
        return [self.until_stop(row[:limit]) for row, limit in zip(ids[:, start:].tolist(), limits, strict=True)]

    def until_stop(self, ids: list[int]) -> list[int]:
        """The ids up to and including the first stop token."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return ids[: end + 1]
