"""On real pretrained weights right rows are learnt by heart, and each wrong shape is told by the check that can see it.

Run: tox run -e weights -- -k training      (measured figures: docs/real-weights.md)
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from glm4ft.data.encoded_row import IGNORED
from glm4ft.data.formats import make_format
from glm4ft.data.inputs import data_inputs
from glm4ft.data.reader import read_conversations
from glm4ft.diagnosis.run_folder import explain_run
from glm4ft.floors.find_floor import find_floor
from glm4ft.floors.floor import Floor
from glm4ft.floors.head import read_head
from glm4ft.floors.stops import stop_warnings
from glm4ft.model.base_model import load_format
from glm4ft.model.generation import greedy
from glm4ft.model.merge import merge_adapter
from glm4ft.report.floor_view import encoded_rows
from glm4ft.report.observed_run import ObservedRun
from glm4ft.testing.stability import assert_grad_norms_stable
from glm4ft.testing.subjects.template_shapes import SHAPES, train_shape, write_conversations
from glm4ft.train.run_folder import ADAPTER_FILES, COMPLETE_MARKER

pytestmark = pytest.mark.weights

GATE = 0.01  # the loss limit of the overfit test
PLATEAU = 0.01  # the largest relative distance of the plateau from the certified floor; measured: 0.004
STEPS = {"right": 30, "header-in": 40, "no-terminator": 30, "dead-stop": 120}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "two.jsonl", 2)


@pytest.fixture(scope="module")
def trained(base: Path, two: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ObservedRun]:
    """The run of a shape; trained once."""

    @functools.cache
    def train(shape: str) -> ObservedRun:
        return train_shape(shape, base, two, tmp_path_factory.mktemp(shape) / "run", steps=STEPS[shape])

    return train


def floor_of(shape: str, base: Path, data: Path) -> Floor:
    tokenizer, name = load_format(str(base))
    rows = encoded_rows(data_inputs(data), SHAPES[shape](name, tokenizer), 4096)
    return find_floor(rows, tokenizer, read_head(str(base)))


def differing_labels(shape: str, base: Path, data: Path) -> set[str]:
    """The texts of the labels in which a shape's rows differ from the right ones."""
    tokenizer, name = load_format(str(base))
    encoder, right = SHAPES[shape](name, tokenizer), make_format(name, tokenizer)
    pairs = [(encoder.encode(c).labels, right.encode(c).labels) for c in read_conversations(data)]
    found = [(a, b) for own, other in pairs for a, b in zip(own, other, strict=True) if a != b]
    return {tokenizer.decode([label]) for pair in found for label in pair if label != IGNORED}


def losses(run: ObservedRun) -> list[float]:
    return [step["loss"] for step in run.trajectory.steps]


def test_right_rows_are_learnt_by_heart_and_said_back(trained: Callable[[str], ObservedRun]) -> None:
    run = trained("right")
    assert min(losses(run)[-5:]) < GATE
    assert len(run.round_trips) == 2
    assert run.is_reproduced
    assert_grad_norms_stable([step["grad_norm"] for step in run.trajectory.steps])


def test_sixteen_conversations_are_learnt_by_heart(base: Path, tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "sixteen.jsonl", 16)
    run = train_shape("right", base, data, tmp_path / "run", steps=120, batch=16, target_loss=GATE)
    assert run.reached_target
    assert sum(turn.exact for turn in run.round_trips) == 16


def test_founding_shape_leaves_no_plateau_and_is_told_by_mask_and_round_trip(
    trained: Callable[[str], ObservedRun], base: Path, two: Path
) -> None:
    """``<|im_start|>`` was trained in pretraining, so the head can say it: no loss shows the wrong mask."""
    floor = floor_of("header-in", base, two)
    assert floor.floor + floor.gap < GATE
    run = trained("header-in")
    assert min(losses(run)[-5:]) < GATE
    assert {"<|im_start|>", "<|im_end|>"} <= differing_labels("header-in", base, two)
    assert not any(turn.exact for turn in run.round_trips)
    assert explain_run(run.output, data=str(two), model=str(base)).verdict == "header-supervised"


def test_missing_terminator_is_told_by_mask_and_round_trip(
    trained: Callable[[str], ObservedRun], base: Path, two: Path
) -> None:
    run = trained("no-terminator")
    assert min(losses(run)[-5:]) < GATE
    assert differing_labels("no-terminator", base, two) == {"<|im_end|>"}
    diagnosis = explain_run(run.output, data=str(two), model=str(base))
    assert diagnosis.verdict == "terminator-never-learned"
    assert "unreachable-target" not in [finding.verdict for finding in diagnosis.findings]


def test_dead_stop_token_is_certified_before_training_and_training_ends_there(
    trained: Callable[[str], ObservedRun], base: Path, two: Path
) -> None:
    floor = floor_of("dead-stop", base, two)
    (warning,) = stop_warnings(floor.tokens, [5])
    assert warning.startswith("WARNING: <file_sep> ends turns here, but the frozen head cannot say it")
    run = trained("dead-stop")
    plateau = sum(losses(run)[-10:]) / 10
    assert floor.floor <= plateau < floor.floor * (1 + PLATEAU)
    assert floor.gap < PLATEAU * floor.floor
    diagnosis = explain_run(run.output, data=str(two), model=str(base))
    # two findings: a server never sees its stop, and the one that was trained in its place cannot be learnt
    assert diagnosis.verdict == "terminator-never-learned"
    assert "<file_sep> ends them instead. The frozen head cannot express it" in diagnosis.text
    assert "unreachable-target" in [finding.verdict for finding in diagnosis.findings]
    assert [turn.stop for turn in diagnosis.evidence.round_trips] == [None, None]


def test_merged_folder_says_what_was_learnt(
    trained: Callable[[str], ObservedRun], base: Path, two: Path, tmp_path: Path
) -> None:
    merge_adapter(trained("right").output, tmp_path / "merged", model=str(base))
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer, name = load_format(str(tmp_path / "merged"))
    encoder = make_format(name, tokenizer)
    for talk in read_conversations(two):
        row = encoder.encode(talk)
        (turn,) = row.turns
        said = greedy(merged, row.input_ids[: turn.start], encoder.stop_ids, 30)
        assert said == row.input_ids[turn.start : turn.end + 1]


def test_resumed_run_is_the_uninterrupted_one(base: Path, two: Path, tmp_path: Path) -> None:
    whole = train_shape("right", base, two, tmp_path / "whole", steps=6, save_every=3)
    part = tmp_path / "part"
    shutil.copytree(whole.output, part)
    for name in (COMPLETE_MARKER, *ADAPTER_FILES):  # as a kill between two checkpoints leaves the folder
        (part / name).unlink()
    shutil.rmtree(part / "checkpoint-6")
    resumed = train_shape("right", base, two, part, steps=6, save_every=3, resume=True)
    assert losses(resumed) == losses(whole)
    own, other = (folder / "adapter_model.safetensors" for folder in (part, whole.output))
    assert own.read_bytes() == other.read_bytes()
