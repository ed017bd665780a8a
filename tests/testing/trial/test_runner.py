"""The runner turns checks into results: healthy pipelines pass, the founding bug fails, known failures must fail.

Run: pytest tests/testing/trial/test_runner.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm4ft.cli.main import run
from glm4ft.errors import ConfigError
from glm4ft.testing.checks import all_checks
from glm4ft.testing.subject import PEER_ENVIRONMENTS, load_subject, make_plan
from glm4ft.testing.trial.registry import Check
from glm4ft.testing.trial.runner import Result, check_subject, run_checks
from glm4ft.testing.trial.stages import STAGES, CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

OWN = "glm4ft.testing.subjects.own:Subject"
FOUNDING_BUG = "glm4ft.testing.subjects.founding_bug:Subject"


def fails(trial: Trial) -> None:
    raise CheckFailed("found 2, expected 1")


def breaks(trial: Trial) -> None:
    raise KeyError("labels")


def is_not_offered(trial: Trial) -> None:
    raise NotImplementedError("no packing")


def does_not_apply(trial: Trial) -> None:
    raise NotApplicable("no chat format")


def passes(trial: Trial) -> None:
    pass


def results(*functions: Any, needs: frozenset[str] = frozenset(), **kwargs: Any) -> list[Result]:
    subject = SimpleNamespace(name="x", tokenizer=object(), encode=print)
    trial = Trial(subject, Path(), Path())
    return list(run_checks(trial, [Check(function, "rows", needs) for function in functions], **kwargs))


def test_each_outcome_has_its_status() -> None:
    """A subject that raises an error gives a result, not a crash of the suite."""
    found = [(r.status, r.message) for r in results(passes, fails, breaks, does_not_apply, is_not_offered)]
    assert found == [
        ("passed", ""),
        ("failed", "found 2, expected 1"),
        ("error", "KeyError: 'labels'"),
        ("skipped", "no chat format"),
        ("skipped", "the subject does not offer this: no packing"),
    ]


def test_check_that_needs_a_missing_part_is_skipped_with_the_reason() -> None:
    (result,) = results(passes, needs=frozenset({"train", "save"}))
    assert (result.status, result.message) == ("skipped", "the subject has no save, train")


class Choosy:
    """Refuses conversations with a system message, and all conversations if ``only`` is "none"."""

    name, chat_format = "choosy", None
    tokenizer = SimpleNamespace(chat_template="", decode=lambda ids, **_: bytes(ids).decode())

    def __init__(self, only: str) -> None:
        self.only = only

    def encode(self, messages: Any, tools: Any = None) -> dict[str, list[int]]:
        if self.only == "none" or messages[0]["role"] == "system":
            raise NotImplementedError("refused")
        ids = list("".join(message["content"] for message in messages).encode())
        return {"input_ids": ids, "labels": [-100] * len(ids)}


@pytest.mark.parametrize(("only", "status"), [("without system", "passed"), ("none", "skipped")])
def test_refused_conversation_is_left_out_but_refusing_all_proves_nothing(only: str, status: str) -> None:
    checks = [check for check in all_checks() if check.name == "every_message_is_in_the_row"]
    (result,) = run_checks(Trial(Choosy(only), Path(), Path()), checks)
    assert result.status == status, result.message


def test_expected_failure_is_strict() -> None:
    """A check that is expected to fail but passes is a failure, so outdated entries are noticed."""
    failing, passing = results(fails, passes, expected_failures={"fails": "theirs", "passes": "theirs"})
    assert (failing.status, failing.message) == ("expected-failure", "theirs: found 2, expected 1")
    assert passing.status == "failed"
    assert "remove the entry" in passing.message


def test_expected_failure_of_no_check_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no check"):
        results(passes, expected_failures={"pases": "a slip"})


def test_checks_come_in_the_order_of_the_stages_and_say_why_they_exist() -> None:
    checks = all_checks()
    assert len({check.name for check in checks}) == len(checks)
    assert {check.stage for check in checks} == set(STAGES)
    order = [STAGES.index(check.stage) for check in checks]
    assert order == sorted(order)
    assert all(check.incident for check in checks)


@pytest.mark.slow
def test_own_trainer_passes_every_check_and_the_results_keep_the_contract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No check that could run is skipped, and with ``--json -`` only the JSON is on stdout."""
    assert run(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1
    assert report["subject"] == OWN
    assert report["seconds"] > 0
    assert [check["check"] for check in report["checks"]] == [check.name for check in all_checks()]
    others = [(check["check"], check["message"]) for check in report["checks"] if check["status"] != "passed"]
    of_reasoning = "the claim is about glm-z1-0414, glm-4.5, glm-4.7, whose turns have reasoning"
    assert others == [
        ("no_empty_reasoning_is_trained", of_reasoning),
        ("reasoning_is_rendered_as_serving_renders_it", of_reasoning),
        ("requested_dropout_acts_in_training_alone", "the subject's lora requests no dropout"),
        ("accuracy_is_that_of_the_supervised_tokens", "evaluate returns no accuracy"),
        ("evaluation_generates_from_the_serving_prompt", "evaluate generates nothing"),
    ]


def test_founding_bug_fails_at_the_rows_and_still_at_the_outcome() -> None:
    """The checks of rows name the header and the missing terminator; those of the outcome see the bug in the run."""
    checks = [check for check in all_checks() if check.name != "mask_reaches_the_loss"]  # which runs every plan
    found = list(check_subject(FOUNDING_BUG, checks, stages=["rows", "outcome"]))
    failed = {stage: [r for r in found if r.status == "failed" and r.stage == stage] for stage in STAGES}
    text = "\n".join(r.message for r in failed["rows"])
    assert "'<|assistant|>' is supervised, should be ignored" in text
    assert "the terminator" in text
    assert {r.check for r in failed["outcome"]} == {
        "two_conversations_reach_a_loss_below_a_hundredth",
        "every_turn_has_learned_to_stop",
        "header_is_not_learned",
        "every_turn_is_reproduced_and_stops",
        "own_inference_reproduces_every_turn",
    }
    loss = next(r.message for r in failed["outcome"] if r.check.startswith("two_conversations"))
    assert re.match(r"before training: .* floor of these targets is 0\.18.*, kept up by <\|assistant\|>", loss)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_colon", "MODULE:ATTR"),
        ("no.such.module:Subject", "No module named"),
        ("glm4ft.testing.subjects.own:Nothing", "Nothing"),
        ("pathlib:PurePosixPath", "not a subject"),
    ],
)
def test_object_that_is_not_a_subject_is_refused(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_subject(spec, tmp_path)


def test_plan_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such key"):
        make_plan(stepps=3)


class EncodesAlone:
    """The founding bug as a pipeline that only encodes."""

    def __init__(self, base_dir: str) -> None:
        whole = load_subject(FOUNDING_BUG, Path(base_dir))
        self.name, self.tokenizer, self.encode, self.chat_format = "x", whole.tokenizer, whole.encode, whole.chat_format


def test_only_the_stages_that_were_asked_for_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    subject = f"{__name__}:{EncodesAlone.__name__}"
    assert run(["check", "--stages", "rows", "--subject", subject, "--json"]) == 1
    stages = {check["stage"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert stages == {"rows"}


@pytest.mark.parametrize("stages", ["rowz", ""])
def test_a_stage_that_does_not_exist_is_refused(stages: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", f"--stages={stages}"]) == 2
    assert "no such stage" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "environment"), PEER_ENVIRONMENTS.items())
def test_adapter_of_a_peer_that_is_missing_names_its_environment(
    name: str, environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"glm4ft.testing.subjects.{name}"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=re.escape(environment)):
        load_subject(f"{module}:Subject", tmp_path)
