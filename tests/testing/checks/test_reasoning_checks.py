"""The claims about rows hold for the formats with reasoning, and each known fault of such rows breaks one.

Run: pytest tests/testing/checks/test_reasoning_checks.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm4ft.data.encoded_row import EncodedRow
from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.checks import all_checks
from glm4ft.testing.faults import rows_reasoning
from glm4ft.testing.faults.registry import FAULTS
from glm4ft.testing.subjects.reasoning_loop import Subject, Subject47, SubjectZ1
from glm4ft.testing.trial.registry import Check
from glm4ft.testing.trial.runner import run_check
from glm4ft.testing.trial.trial import Trial

# of rows, without those that train a model
ROWS = [check for check in all_checks() if check.stage == "rows" and not {"train", "build_model"} & set(check.needs)]
KNOWN = [fault for fault in FAULTS.values() if fault.subject.__module__ == rows_reasoning.__name__]
UNUSED = {  # not applicable: the claim is about formats without reasoning, or needs more than rows
    "reasoning_tags_are_encoded_as_text", "no_stale_ids_are_used",
}  # fmt: skip
UNUSED_IN_Z1 = {  # its template deletes the reasoning that is to be trained; serving asks for the last turn alone
    "reasoning_is_rendered_as_serving_renders_it",
    "loss_flag_is_honoured",
    "loss_flag_means_the_same_in_every_spelling",
}


@pytest.fixture(scope="module")
def trial_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[Any]], Trial]:
    bases: dict[str, Path] = {}

    def make(kind: type[Any]) -> Trial:
        if kind.architecture not in bases:
            bases[kind.architecture] = write_tiny_base(
                tmp_path_factory.mktemp("base"), architecture=kind.architecture, chat_format=kind.chat_format
            )
        base = bases[kind.architecture]
        return Trial(kind(str(base)), base, tmp_path_factory.mktemp("trial"))

    return make


@pytest.mark.parametrize("kind", [Subject, Subject47, SubjectZ1])
@pytest.mark.parametrize("check", ROWS, ids=lambda check: check.name)
def test_holds_for_rows_with_reasoning(check: Check, kind: type[Any], trial_of: Any) -> None:
    if check.name == "no_stale_ids_are_used":
        pytest.skip("trains a model")
    result = run_check(check, trial_of(kind))
    unused = UNUSED | (UNUSED_IN_Z1 if kind is SubjectZ1 else set())
    assert result.status == ("skipped" if check.name in unused else "passed"), result.message


@pytest.mark.parametrize("fault", KNOWN, ids=lambda fault: fault.id)
def test_each_fault_is_red_at_rows_and_names_its_cause(fault: Any, trial_of: Any) -> None:
    trial = trial_of(fault.subject)
    failed = next((r for c in ROWS if (r := run_check(c, trial)).status == "failed"), None)
    assert failed is not None
    assert re.search(fault.cause, failed.message), failed.message


class BlankReasoning(Subject):
    """Turns without reasoning begin with a block of line breaks, which is trained (LLaMA-Factory's glm4_moe)."""

    def row(self, conversation: Any) -> EncodedRow:
        row = super().row(conversation)
        opened, closed = self.control_ids["<think>"], self.control_ids["</think>"]
        ids, supervised = list[int](), list[bool]()
        for at, (token, keep) in enumerate(zip(row.input_ids, row.supervised, strict=True)):
            is_empty = row.input_ids[at - 1 : at + 1] == [opened, closed]
            ids += [*self.tokenizer.encode("\n\n"), token] if is_empty else [token]
            supervised += [True] * (len(ids) - len(supervised)) if is_empty else [keep]
        return EncodedRow(ids, supervised, (), row.turns)


def test_a_block_of_white_space_is_an_empty_block(trial_of: Any) -> None:
    check = next(check for check in ROWS if check.name == "no_empty_reasoning_is_trained")
    result = run_check(check, trial_of(BlankReasoning))
    assert "the end of an empty block of reasoning is supervised" in result.message


def test_ten_kinds_of_wrong_masks_are_known() -> None:
    assert sum("supervised" in vars(fault.subject) for fault in KNOWN) >= 10
