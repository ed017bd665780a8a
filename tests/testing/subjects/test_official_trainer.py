"""The official script as a trainer needs GLM-4's own ids, and is faithful in what it does with rows and prompts.

Run: pytest tests/testing/subjects/test_official_trainer.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from glm4ft.errors import ModelError
from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects import official_script
from glm4ft.testing.subjects.official_trainer import PAD, PREFIX, USER, Subject

TALK = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "the river"},
    {"role": "user", "content": "and?"}, {"role": "assistant", "content": "a"},
]  # fmt: skip


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(str(write_tiny_base(tmp_path_factory.mktemp("ids") / "base", glm4_ids=True)))


def test_base_with_other_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ids of GLM-4's vocabulary written into its code") as caught:
        Subject(str(write_tiny_base(tmp_path / "base")))
    assert "--model tiny-glm4-ids" in str(caught.value)


def test_rows_have_the_ids_that_are_written_into_the_code(subject: Subject) -> None:
    row = subject.encode(TALK)
    assert row["input_ids"][:2] == PREFIX
    assert row["input_ids"][-1] == row["labels"][-1] == USER
    tokenizer_based = official_script.Subject.encode(subject, TALK)
    assert row == tokenizer_based


def test_collator_pads_rows_on_the_left_and_answers_on_the_right(subject: Subject) -> None:
    prompts = subject._prompts(TALK, None)
    header = subject.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert [prompt["input_ids"][-1] for prompt in prompts] == [header, header]
    batch = subject._collator()(prompts, return_tensors="pt")
    short, long = batch["input_ids"].tolist()
    assert short[:1] == [PAD]
    assert long == prompts[1]["input_ids"]
    first, second = (prompt["output_ids"] for prompt in prompts)
    assert batch["output_ids"].tolist() == [first, [*second, *[PAD] * (len(first) - len(second))]]
    assert "output_ids" in prompts[0]  # the data set is as it was


def test_what_was_learnt_by_heart_is_generated_in_its_evaluation(subject: Subject, tmp_path: Path) -> None:
    model = subject.build_model(subject.tokenizer.name_or_path, 0)
    talk = {"messages": TALK[:2], "tools": None}
    assert subject.evaluate(model, [talk]) == {"exact": 0.0}
    subject.train(model, [talk], make_plan(steps=12, learning_rate=1e-2, output_dir=str(tmp_path)))
    assert subject.evaluate(model, [talk]) == {"exact": 1.0}
