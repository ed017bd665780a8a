"""A base outside the GLM-4 family is trained, judged and merged as its own template says.

Run: pytest tests/train/test_template_base.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from glm4ft.cli.main import run as command
from glm4ft.data.conversation import Message
from glm4ft.data.formats import make_format
from glm4ft.diagnosis.run_folder import explain_run
from glm4ft.model.base_model import load_format
from glm4ft.model.generation import greedy
from glm4ft.model.merge import merge_adapter
from glm4ft.report.observed_run import ObservedRun, train_observed
from glm4ft.testing.bases.chatml_base import write_chatml_base
from glm4ft.train.config import TrainConfig

TALKS = [("Which river?", "The river of the city."), ("What is it?", "A tool.")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chatml_base(tmp_path_factory.mktemp("chatml") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "two.jsonl"
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in TALKS]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


@pytest.fixture(scope="module")
def learnt(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> ObservedRun:
    config = TrainConfig(
        data=str(data), model=str(base), output=str(tmp_path_factory.mktemp("run") / "run"), learning_rate=5e-3,
        schedule="constant", max_steps=60, target_loss=0.01, round_trip=True, save_every=0,
    )  # fmt: skip
    return train_observed(config, say=lambda _: None)


def test_two_conversations_are_learnt_by_heart_and_said_back(learnt: ObservedRun) -> None:
    assert learnt.reached_target
    assert [turn.stop for turn in learnt.round_trips] == ["<|im_end|>"] * 2
    assert learnt.is_reproduced


def test_run_is_explained_turn_by_turn(learnt: ObservedRun, base: Path) -> None:
    diagnosis = explain_run(learnt.output, model=str(base))
    assert diagnosis.verdict == "learnt"
    assert {(token.role, token.part) for token in diagnosis.evidence.supervised} == {
        ("assistant", "body"), ("assistant", "terminator"),
    }  # fmt: skip


def test_merged_folder_is_a_plain_llama_that_says_what_was_learnt(
    learnt: ObservedRun, base: Path, tmp_path: Path
) -> None:
    merge_adapter(learnt.output, tmp_path / "merged", model=str(base))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "partial_rotary_factor" not in config
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer, name = load_format(str(tmp_path / "merged"))
    encoder = make_format(name, tokenizer)
    for question, answer in TALKS:
        said = greedy(merged, encoder.prompt([Message("user", question)]), encoder.stop_ids, 30)
        assert tokenizer.decode(said) == f"{answer}<|im_end|>"


def test_floor_and_inspect_take_the_base(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["floor", str(data), f"--model={base}", f"--json={tmp_path / 'floor.json'}"]) == 0
    record = json.loads((tmp_path / "floor.json").read_text())
    assert record["floor"] < 0.01
    assert set(record["parts"]) == {"assistant body", "assistant terminator"}
    assert command(["inspect", str(data), f"--model={base}", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(label != -100 for label in row["labels"]) > 2
