"""A stage's verdict is that of its weightiest check, and failures of one cause are told together.

Run: pytest tests/testing/trial/test_verdicts.py
"""

from __future__ import annotations

from glm4ft.testing.trial.runner import Result, Status
from glm4ft.testing.trial.verdicts import FailureGroup, group_failures, stage_verdicts


def result(check: str, stage: str, message: str, cause: str = "", status: Status = "failed") -> Result:
    return Result(check, stage, status, message, 0.0, cause=cause)


def test_one_failure_decides_its_stage() -> None:
    found = stage_verdicts([("rows", "passed"), ("rows", "failed"), ("model", "skipped"), ("update", "passed")])
    assert found == {"rows": "failed", "model": "not judged", "update": "passed"}


def test_equal_causes_are_one_group_whatever_the_stage() -> None:
    found = group_failures(
        [
            result("b", "update", "off by 2", "betas are wrong"),
            result("a", "gradient", "off by 1", "not divided"),
            result("c", "outcome", "too high", "not divided"),
        ]
    )
    assert found == [
        FailureGroup("gradient", "not divided", ["a", "c"]),
        FailureGroup("update", "betas are wrong", ["b"]),
    ]


def test_failure_without_a_cause_belongs_to_its_stage_and_an_outcome_to_the_first_failure() -> None:
    found = group_failures(
        [
            result("mask", "rows", "the header is supervised\nin detail"),
            result("stop", "rows", "no stop"),
            result("rate", "schedule", "the rate is 1"),
            result("loss", "outcome", "the loss is 3"),
        ]
    )
    assert found == [
        FailureGroup("rows", "the header is supervised", ["mask", "stop", "loss"]),
        FailureGroup("schedule", "the rate is 1", ["rate"]),
    ]


def test_one_error_in_many_checks_is_one_group() -> None:
    crashed = [result(name, stage, "KeyError: 'x'", status="error") for name, stage in (("a", "rows"), ("b", "update"))]
    assert [group.checks for group in group_failures(crashed)] == [["a", "b"]]


def test_what_did_not_fail_is_in_no_group() -> None:
    others: tuple[Status, ...] = ("passed", "skipped", "expected-failure")
    assert group_failures([result("a", "rows", "m", status=status) for status in others]) == []
