"""The mask of a subject outside the GLM-4 family is judged by what the template of its base writes around an answer.

Run: pytest tests/testing/checks/test_template_rows.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm4ft.data.template_format import TemplateFormat
from glm4ft.data.turn_format import TEMPLATE
from glm4ft.testing.bases.chatml_base import write_chatml_base
from glm4ft.testing.checks import loss_flags, rows
from glm4ft.testing.subjects import own, transformers_trainer
from glm4ft.testing.subjects.template_shapes import HeaderIn, NoTerminator, OtherStop
from glm4ft.testing.trial.registry import CHECKS, Check
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial
from glm4ft.testing.trial.turns import sampled_spans

MODULES = {rows.__name__, loss_flags.__name__}
ROWS = {check.name: check for check in CHECKS if check.run.__module__ in MODULES and "train" not in check.needs}
GLM_ONLY = ("prefix_occurs_once", "supervised_text_is_the_answer")


class EndOfText(OtherStop):
    stop = "<|endoftext|>"


def last_only(name: str, tokenizer: Any) -> TemplateFormat:
    return TemplateFormat(name, tokenizer, train_on="last")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chatml_base(tmp_path_factory.mktemp("chatml") / "base")


def trial_of(base: Path, folder: Path, encoder: Any = TemplateFormat) -> Trial:
    subject = own.Subject(str(base))
    subject.format = encoder(TEMPLATE, subject.tokenizer)
    subject.stop_ids = [subject.tokenizer.eos_token_id]
    return Trial(subject, base, folder)


@pytest.mark.parametrize("check", ROWS.values(), ids=lambda check: check.name)
def test_right_rows_pass(check: Check, base: Path, tmp_path: Path) -> None:
    trial = trial_of(base, tmp_path)
    if check.name in GLM_ONLY:
        with pytest.raises(NotApplicable):
            check.run(trial)
    else:
        check.run(trial)


@pytest.mark.parametrize("subject", [own.Subject, transformers_trainer.Subject], ids=lambda s: s.__module__)
def test_subjects_take_format_and_adapters_from_the_base(subject: Any, base: Path) -> None:
    made = subject(str(base))
    assert made.chat_format is None
    assert "gate_proj" in made.lora["target_modules"]


@pytest.mark.parametrize(
    ("encoder", "check", "says"),
    [
        (HeaderIn, "mask_is_what_the_model_must_sample", "is supervised: part of an assistant header"),
        (NoTerminator, "mask_is_what_the_model_must_sample", "is ignored: the terminator"),
        (last_only, "mask_is_what_the_model_must_sample", r"turn 1 \(message 1\) is ignored, should be supervised"),
        (EndOfText, "mask_is_what_the_model_must_sample", "behind|terminator|part of an answer"),
        (HeaderIn, "every_turn_ends_in_one_stop", "the terminator, is ignored, should be supervised"),
        (NoTerminator, "every_turn_ends_in_one_stop", "the terminator, is ignored, should be supervised"),
        (EndOfText, "every_turn_ends_in_one_stop", "no terminator; the row ends after the answer"),
    ],
)
def test_wrong_rows_fail_with_the_token(encoder: Any, check: str, says: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=says):
        ROWS[check].run(trial_of(base, tmp_path, encoder))


def test_stop_that_the_subject_does_not_stop_at_is_named(base: Path, tmp_path: Path) -> None:
    trial = trial_of(base, tmp_path)
    trial.subject.stop_ids = [0]
    with pytest.raises(CheckFailed, match=r"is not among the subject's stop_ids \[0\]"):
        ROWS["every_turn_ends_in_one_stop"].run(trial)


def test_template_without_marks_is_not_judged(base: Path, tmp_path: Path) -> None:
    trial = trial_of(base, tmp_path)
    trial.base_tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(NotApplicable, match="the subject names no GLM-4 chat format, and the chat template"):
        ROWS["mask_is_what_the_model_must_sample"].run(trial)


def test_what_is_sampled_begins_behind_the_prompt_and_ends_with_the_terminator(base: Path, tmp_path: Path) -> None:
    trial = trial_of(base, tmp_path)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a river"}]
    ids = trial.subject.encode(talk)["input_ids"]
    (turn,) = sampled_spans(trial, ids)
    assert list(ids[: turn.start]) == trial.subject.prompt(talk[:1])
    assert trial.subject.tokenizer.decode(ids[turn.start : turn.stop]) == "a river<|im_end|>"
