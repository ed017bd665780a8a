"""A plan that a subject refuses leaves the others judged.

Run: pytest tests/testing/trial/test_offered_plans.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from glm4ft.testing.trial.trial import Trial

PLANS: tuple[dict[str, Any], ...] = ({"packing": True}, {"accumulation": 2}, {})


def offered(refused: tuple[str, ...]) -> list[Any]:
    def run(**changes: Any) -> str:
        if refused and set(refused) <= changes.keys():
            raise NotImplementedError(f"no {refused}")
        return f"run of {sorted(changes)}"

    return Trial.offered(SimpleNamespace(run=run), PLANS, steps=4)  # type: ignore[arg-type]


def test_a_refused_plan_leaves_the_others() -> None:
    assert [(changes, run) for changes, run in offered(("packing",))] == [
        ({"accumulation": 2}, "run of ['accumulation', 'steps']"),
        ({}, "run of ['steps']"),
    ]


def test_a_subject_that_refuses_all_plans_is_told_so() -> None:
    with pytest.raises(NotImplementedError, match="no \\('steps',\\)"):
        offered(("steps",))
