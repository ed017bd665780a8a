"""What users vary is varied: spellings of a flag, seeds, lengths, earlier turns, plans of a resume, lost numbers.

Run: pytest tests/testing/checks/test_varied_inputs.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import pytest
import torch

from glm4ft.data.conversation import Message
from glm4ft.model.generation import greedy
from glm4ft.testing.checks import all_checks
from glm4ft.testing.subjects.plain_loop import LoopState, Subject
from glm4ft.testing.subjects.plain_loop_data import Features
from glm4ft.testing.trial.stages import CheckFailed
from glm4ft.testing.trial.trial import Trial

CHECKS = {check.name: check for check in all_checks()}
NUMBERS, FLAGS = "numbers_that_are_not_finite_are_reported", "loss_flag_means_the_same_in_every_spelling"
SEED, RESUMED = "adapters_depend_on_the_seed_alone", "resumed_run_equals_the_uninterrupted_run"
REASONING, LONG = "reasoning_tags_are_encoded_as_text", "long_conversations_are_not_cut"


class LogsZeroForNan(Subject):
    def log_entry(self, run: LoopState, loss: float, grad_norm: float) -> dict[str, Any]:
        kept = [0.0 if not math.isfinite(number) else number for number in (loss, grad_norm)]
        return super().log_entry(run, *kept)


class SkipsTheStepInSilence(Subject):
    last = (1.0, 1.0)

    def log_entry(self, run: LoopState, loss: float, grad_norm: float) -> dict[str, Any]:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.last = (loss, grad_norm)
        return super().log_entry(run, *self.last)


class EvaluationDropsNan(Subject):
    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (
            super().loss_sum(logits, labels)
            if torch.is_grad_enabled()
            else super().loss_sum(logits, labels).nan_to_num(0)
        )


class ZeroIsNotFalse(Subject):
    def read(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> Any:
        changed = [{**m, "loss": True} if type(m.get("loss")) in (int, float) else m for m in messages]
        return super().read(changed, tools)


class NullIsFalse(Subject):
    def read(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> Any:
        changed = [{**m, "loss": False} if "loss" in m and m["loss"] is None else m for m in messages]
        return super().read(changed, tools)


class SeedReachesNothing(Subject):
    def attach(self, base: Any, seed: int) -> Any:
        return super().attach(base, 42)


class NotRepeatable(Subject):
    calls = 0

    def attach(self, base: Any, seed: int) -> Any:
        NotRepeatable.calls += 1
        return super().attach(base, 1000 + self.calls)


class ResumeForgetsAccumulation(Subject):
    def skip_seen_items(self, stream: Iterator[int], num_items: int, run: LoopState) -> Iterator[int]:
        return islice(stream, run.step * run.plan["micro_batch_size"], None)


class CutsEarlierReasoning(Subject):
    def ordered(self, messages: Sequence[Message]) -> list[Message]:
        kept = super().ordered(messages)
        last = max(i for i, m in enumerate(kept) if m.role == "assistant")
        return [
            Message(m.role, m.content.replace("<think>", ""), m.metadata, m.loss)
            if m.role == "assistant" and i < last else m for i, m in enumerate(kept)
        ]  # fmt: skip


class CutsAtItsLimit(Subject):
    max_length = 6000

    def fit(self, row: Features) -> Features:
        return {name: ids[: self.max_length] for name, ids in row.items()}


class GeneratesInTrainingMode(Subject):
    def generate(self, model: Any, messages: Any, tools: Any, max_new_tokens: int) -> list[int]:
        return greedy(model.train(), self.prompt(messages, tools), self.stop_ids, max_new_tokens)


CASES = (
    (LogsZeroForNan, NUMBERS, "loss of step 2 .* the log hides it"),
    (SkipsTheStepInSilence, NUMBERS, "of step 2 .* the log hides it"),
    (EvaluationDropsNan, NUMBERS, "evaluation were made NaN from outside, and it reports"),
    (ZeroIsNotFalse, FLAGS, "a loss flag of 0 is taken for true, it means false"),
    (NullIsFalse, FLAGS, "a loss flag of None is taken for false, it means true"),
    (SeedReachesNothing, SEED, "seed 0 and seed 1 have the same trained parameters"),
    (NotRepeatable, SEED, "two models of seed 0 differ in"),
    (ResumeForgetsAccumulation, RESUMED, r"accumulation=2.*: step 4 trains on other rows"),
    (CutsEarlierReasoning, REASONING, "as an earlier answer became"),
    (CutsAtItsLimit, LONG, r"a row of 6,\d\d\d tokens is cut to 6,000, and nothing says so"),
    (GeneratesInTrainingMode, "evaluation_runs_in_eval_mode", "ran in training mode"),
)


@pytest.mark.parametrize(("subject", "check", "says"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_variation_that_is_ignored_fails(
    subject: type[Subject], check: str, says: str, healthy: Trial, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trial = Trial(subject(str(healthy.base_dir)), healthy.base_dir, tmp_path_factory.mktemp("trial"))
    with pytest.raises(CheckFailed, match=says):
        CHECKS[check].run(trial)


@pytest.mark.parametrize("check", sorted({check for _, check, _ in CASES}))
def test_healthy_pipeline_passes(check: str, healthy: Trial) -> None:
    with nullcontext():
        CHECKS[check].run(healthy)


def test_limit_that_is_told_is_no_fault(healthy: Trial, tmp_path_factory: pytest.TempPathFactory) -> None:
    class CutsAloud(CutsAtItsLimit):
        def fit(self, row: Features) -> Features:
            import warnings

            if len(row["input_ids"]) > self.max_length:
                warnings.warn("a row was cut", stacklevel=2)
            return super().fit(row)

    CHECKS[LONG].run(Trial(CutsAloud(str(healthy.base_dir)), healthy.base_dir, tmp_path_factory.mktemp("aloud")))
