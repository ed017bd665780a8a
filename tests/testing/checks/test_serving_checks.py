"""The checks of serving judge what they can where a pipeline's rows are not as they should be.

Run: pytest tests/testing/checks/test_serving_checks.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from glm4ft.testing.checks import all_checks
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.subjects.plain_loop_data import Features
from glm4ft.testing.trial.trial import Trial

CHECKS = {check.name: check for check in all_checks()}


class Endless(Subject):
    """Rows end behind the last answer, without a token that ends the turn, as with TRL's prompt and completion."""

    def fit(self, row: Features) -> Features:
        return super().fit({name: ids[:-1] for name, ids in row.items()})


@pytest.mark.parametrize(
    "name",
    ["own_inference_keeps_the_prompt_and_the_length_limit", "evaluation_generates_from_the_serving_prompt"],
)
def test_prompts_are_found_where_no_terminator_follows_the_answers(name: str, healthy: Trial) -> None:
    CHECKS[name].run(replace(healthy, subject=Endless(str(healthy.base_dir))))
