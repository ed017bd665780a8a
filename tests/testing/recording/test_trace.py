"""A recording shows the labels, weights and settings that a run really used, on unmodified trainers.

Run: pytest tests/testing/recording/test_trace.py
Labels and weights are recovered from the gradient at the final norm and compared with those that were encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from glm4ft.data.encoded_row import IGNORED
from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.recording.trace import Forward, Step, Trace
from glm4ft.testing.recording.trace_file import read_trace, write_trace
from glm4ft.testing.replay.history import History
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.replay.tolerances import WEIGHT_LIMITS
from glm4ft.testing.specification.recovered_targets import split_rows
from glm4ft.testing.subjects import own, plain_loop, transformers_trainer
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.trial import Trial

CHECKPOINTING = {"gradient_checkpointing": True}


class Reentrant(transformers_trainer.Subject):
    """The other kind of checkpointing, which runs its forward pass without gradients."""

    def make_trainer(self, model: Any, rows: Any, plan: Mapping[str, Any]) -> Trainer:
        trainer = super().make_trainer(model, rows, plan)
        trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": True}
        return trainer


@dataclass(frozen=True)
class SetUp:
    """A trainer, its plan and the dtype of its base."""

    id: str
    subject: Any
    plan: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


SETUPS = (
    SetUp("ours", own.Subject),
    SetUp("ours-packed", own.Subject, {"packing": True, "micro_batch_size": 1}),
    SetUp("ours-checkpointing", own.Subject, CHECKPOINTING),
    SetUp("trainer", transformers_trainer.Subject),
    SetUp("trainer-accumulation", transformers_trainer.Subject, {"accumulation": 3}),
    SetUp("trainer-checkpointing", transformers_trainer.Subject, CHECKPOINTING),
    SetUp("trainer-reentrant-checkpointing", Reentrant, CHECKPOINTING),
    SetUp("trainer-bf16", transformers_trainer.Subject, dtype=torch.bfloat16),
    SetUp("loop-packed", plain_loop.Subject, {"packing": True, "micro_batch_size": 1}),
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    return {
        dtype: write_tiny_base(tmp_path_factory.mktemp("base"), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }


def replayed_steps(run: RecordedRun) -> list[ReplayedStep]:
    history = History(run.reference, run.known, run.plan, run.trace.dtype)
    return [ReplayedStep(number, step, history) for number, step in enumerate(run.trace.steps, start=1)]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.id)
def test_labels_and_weights_are_those_that_were_encoded(
    setup: SetUp, bases: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    """No wrong label among all tokens of two steps; a token's weight is one over the step's targets."""
    base_dir = bases[setup.dtype]
    run = Trial(setup.subject(str(base_dir)), base_dir, tmp_path).run(steps=2, **setup.plan)
    assert run.trace.dtype == setup.dtype
    assert len(run.trace.steps) == 2
    for step in replayed_steps(run):
        assert step.seen
        weights = []
        for row in step.seen:
            expected = torch.tensor(step.labels_of(row.ids))
            got = row.targets.labels_T.clone()
            assert got[1:].tolist() == expected[1:].tolist()
            weights.append(row.targets.weights_T[expected != IGNORED] * step.num_targets)
        assert float((torch.cat(weights) - 1).abs().median()) <= WEIGHT_LIMITS[setup.dtype]
    assert run.verdict.departure is None, str(run.verdict.departure)


def test_trace_survives_the_disk(bases: dict[torch.dtype, Path], tmp_path: Path) -> None:
    """A trace that is written and read keeps every tensor and every setting that is judged."""
    base_dir = bases[torch.float32]
    run = Trial(plain_loop.Subject(str(base_dir)), base_dir, tmp_path).run(steps=2, packing=True, accumulation=2)
    write_trace(run.trace, tmp_path / "trace", {"log": run.log})
    trace, about = read_trace(tmp_path / "trace")
    assert about["log"] == run.log
    assert (trace.trained, trace.optimized, trace.dtype) == (run.trace.trained, run.trace.optimized, run.trace.dtype)
    for got, expected in zip(trace.steps, run.trace.steps, strict=True):
        for name in ("raw", "clipped", "before", "after"):
            ours, theirs = getattr(got, name), getattr(expected, name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        assert [f.input_ids_BT.tolist() for f in got.forwards] == [f.input_ids_BT.tolist() for f in expected.forwards]
        assert [f.training for f in got.forwards] == [f.training for f in expected.forwards]
        assert [g.settings["lr"] for g in got.groups] == [g.settings["lr"] for g in expected.groups]


def test_second_pass_over_the_batch_of_its_step_is_no_evaluation() -> None:
    def forward(*ids: int) -> Forward:
        return Forward(torch.tensor([ids]), None, None, torch.zeros(1, len(ids), 2), None, training=True)

    own, other = forward(1, 2), forward(1, 2, 3)
    step = Step([own], {}, {}, {}, [], "AdamW")
    trace = Trace(steps=[step], evaluations=[(0, forward(1, 2)), (0, other), (1, forward(1, 2))])
    assert [(num_steps, found.input_ids_BT.shape[1]) for num_steps, found in trace.evaluated] == [(0, 3), (1, 2)]
    trace.steps *= 2  # now the second step has no such pass, so that the first's is an evaluation of the same rows
    trace.evaluations.pop()
    assert [num_steps for num_steps, _ in trace.evaluated] == [0, 0]


def test_row_of_a_step_of_generation_with_a_cache_is_its_last_tokens() -> None:
    """The mask covers the cached tokens too, and the ids are only the new ones."""
    mask = torch.ones(2, 21)
    mask[1, -1] = 0
    step = Forward(torch.tensor([[7], [8]]), None, mask, torch.zeros(2, 1, 4), None, training=False)
    assert [(b, positions.tolist()) for b, positions in split_rows(step)] == [(0, [0]), (1, [])]


class TriesFirst(plain_loop.Subject):
    """Before the first step, a batch is run forward and backward and its gradient thrown away."""

    def begin(self, model: Any, conversations: Any, plan: Mapping[str, Any]) -> plain_loop.LoopState:
        run = super().begin(model, conversations, plan)
        batch = self.collate(run.rows[:2])
        self.backward(self.loss_sum(self.forward(run.wrapped, batch), batch["labels"]))
        run.model.zero_grad()
        return run


class ClearsEachTime(plain_loop.Subject):
    """A fault: the gradient of every micro-batch but the last is thrown away."""

    def train_micro_batch(self, run: Any, *args: Any) -> torch.Tensor:
        self.zero_grad(run)
        return super().train_micro_batch(run, *args)


@pytest.mark.parametrize(("kind", "stage"), [(TriesFirst, None), (ClearsEachTime, "gradient")])
def test_passes_that_only_try_the_model_are_no_part_of_the_first_step(
    kind: type[plain_loop.Subject], stage: str | None, bases: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    base_dir = bases[torch.float32]
    run = Trial(kind(str(base_dir)), base_dir, tmp_path).run(steps=2, accumulation=2)
    assert [len(step.forwards) for step in run.trace.steps] == [2, 2]
    assert (run.verdict.departure.stage if run.verdict.departure else None) == stage
