"""Faults of every stage are caught, and results and pages of ``glm4ft faults`` have their documented form.

Run: pytest tests/testing/faults/test_faults.py; all faults: glm4ft faults
Here twelve faults are run on the checks of their own stage; the command runs all faults, on earlier stages too.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from glm4ft.cli.main import run
from glm4ft.testing.checks import all_checks
from glm4ft.testing.faults.calibration import CleanRun, collect, thresholds_page
from glm4ft.testing.faults.pages import matrix_page
from glm4ft.testing.faults.practices import PRACTICES, Noticed, follows, is_overfit
from glm4ft.testing.faults.reach import known_reach, reaching
from glm4ft.testing.faults.registry import EXTERNAL_MODULES, FAULTS, all_faults
from glm4ft.testing.faults.results import Caught, Matrix, Silence
from glm4ft.testing.faults.runner import try_fault
from glm4ft.testing.faults.variations import all_variations
from glm4ft.testing.replay.tolerances import Observation, observing, within
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.trial.stages import STAGES

ROOT = Path(__file__).parents[3]
DOZEN = (
    "assistant-header-trained",
    "stop-token-not-appended",
    "default-max-length",
    "isolation-lost-to-2d-mask",
    "lora-scale-missing",
    "mean-of-micro-means",
    "clip-before-unscale",
    "sched-horizon-wrong",
    "weight-decay-grouping",
    "evaluation-spends-random-numbers",
    "resume-random-state-lost",
    "eval-prompt-cuts-question",
)


@pytest.mark.slow
@pytest.mark.parametrize("id", DOZEN)
@pytest.mark.usefixtures("named_plans_only")
def test_fault_is_caught_at_its_stage(id: str, tmp_path: Path) -> None:
    stage = all_faults()[id].stage
    caught = try_fault(id, tmp_path, stages=[stage])
    assert caught.caught_by, caught.errors
    assert caught.names_cause, caught.message


def test_every_fault_says_what_it_is() -> None:
    for fault in all_faults().values():
        assert fault.story.endswith("."), fault.id
        assert re.search(r"\d|finetune|OC[GH]|masking_utils|made up", fault.evidence), fault.id
        re.compile(fault.cause)
    assert {fault.stage for fault in all_faults().values()} == set(STAGES)
    assert not all_faults().keys() & all_variations().keys()


def test_reach_names_checks_and_members_that_exist() -> None:
    """An outdated name would hide a fault from a check; a new check that is not listed is run on every fault."""
    again = "measure again: python -m glm4ft.testing.faults.reach"
    assert set(known_reach()) <= {check.name for check in all_checks()}, again
    members = {name for kind in Subject.__mro__ for name in vars(kind)}
    assert not {name for names in known_reach().values() for name in names} - members, again


def test_only_checks_that_use_what_a_fault_changes_are_run_on_it() -> None:
    names = {check.name for check in reaching(all_faults()["merge-without-scale"].subject)}
    assert "merged_model_equals_the_adapted_model" in names
    assert "mask_is_what_the_model_must_sample" not in names
    assert len(reaching(Subject)) == len(reaching(all_variations()["healthy"].subject)) == len(all_checks())


def test_command_keeps_the_contract_and_fails_for_a_fault_that_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["faults", "double-prefix", "--json", "--workers", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    (fault,) = report["faults"]
    assert report["schema"] == 1
    assert report["benign"] == []
    assert set(fault) == {"id", "expected_stage", "caught_by", "diagnosed_stage", "cause", "seconds"}
    assert (fault["id"], fault["diagnosed_stage"]) == ("double-prefix", "rows")
    assert fault["caught_by"]


def test_unknown_fault_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["faults", "no-such-fault"]) == 2
    assert "no such fault" in capsys.readouterr().err


def test_thresholds_without_a_healthy_pipeline_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "thresholds.md"
    assert run(["faults", "wrong-stop-id", "--calibrate", str(page)]) == 2
    assert "name variations, too" in capsys.readouterr().err
    assert not page.exists()


OWN_FAULT = """
from dataclasses import replace
from glm4ft.testing.faults.registry import faults_at
from glm4ft.testing.subjects.plain_loop import Subject

@faults_at("rows")("mine-header-trained", evidence="mine 1", cause="should be ignored")
class Mine(Subject):
    \"\"\"The header before an answer is trained.\"\"\"

    def render(self, conversation):
        return [replace(s, supervised=s.supervised or s.text == "<|assistant|>") for s in super().render(conversation)]
"""


def test_faults_of_other_modules_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(EXTERNAL_MODULES, "")  # which the command sets for its worker processes
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_own_faults.py").write_text(OWN_FAULT)
    try:
        assert run(["faults", "mine-header-trained", "--module", "my_own_faults", "--json", "--workers", "1"]) == 0
    finally:
        FAULTS.pop("mine-header-trained", None)
    found = json.loads(capsys.readouterr().out)["faults"][0]
    assert found["diagnosed_stage"] == "rows"
    assert found["cause"]

    assert run(["faults", "--module", "no_such_faults", "--workers", "1"]) == 2
    assert "the module of faults cannot be imported\n  where:    --module" in capsys.readouterr().err


def a_matrix(*faults: Caught, alarms: tuple[str, ...] = ()) -> Matrix:
    noticed = {fault.id: Noticed(fault.id, (False, True, True)) for fault in faults}
    return Matrix(faults, (Silence("healthy", alarms, 1.0),), noticed, 2.0)


CAUGHT = Caught("double-prefix", "rows", ("prefix_occurs_once",), "rows", "a second | prefix", True, 0.1)
MISSED = Caught("pad-in-loss", "batches", (), "", "", False, 0.1)
ELSEWHERE = Caught("clip-by-value", "clipping", ("some_check",), "update", "", False, 0.1)


def test_missed_fault_wrong_stage_and_false_alarm_are_failures() -> None:
    assert a_matrix(CAUGHT).failures == []
    assert a_matrix(CAUGHT, MISSED, ELSEWHERE, alarms=("x",)).failures == ["pad-in-loss", "clip-by-value", "healthy"]


def test_page_shows_score_practices_and_what_escapes() -> None:
    page = matrix_page(a_matrix(CAUGHT, MISSED, ELSEWHERE))
    assert "caught: 2 of 3 (67%)" in page
    assert "stage right: 1 of 3 (33%)" in page
    assert f"| {PRACTICES[1]} | 3 of 3 (100%) |" in page
    assert "**not caught**" in page
    assert "some check (**update**)" in page
    assert page.count("What would still escape") == 3


def test_threshold_stands_between_clean_runs_and_the_nearest_fault() -> None:
    large = {("x", 1e-5): 2e-7, ("x", 3e-2): 1e-2, ("y", 1.0): 0.0}
    clean = [CleanRun("a", 0, {("x", 1e-5): 1e-7}, ()), CleanRun("b", 0, large, ())]
    x, in_bf16, y = collect(clean, {"far": [Observation("x", 4e-5, 1e-5)], "farther": [Observation("x", 5e-5, 1e-5)]})
    assert (x.nearest, x.room) == ((4e-5, "far"), pytest.approx(200))
    assert (in_bf16.limit, in_bf16.clean, in_bf16.nearest) == (3e-2, (1e-2,), None)
    assert y.nearest is None
    page = thresholds_page([x], clean)
    assert "| x | 1.5e-07 | 2.0e-07 | 1.0e-05 | `far` | 4.0e-05 | 2e+02 |" in page
    assert "2 runs" in page
    assert "`a` (1 seeds)" in page


def test_comparisons_are_noted_and_nan_is_not_within() -> None:
    with observing() as seen:
        assert within("x", 1.0, 1.0)
        assert not within("x", float("nan"), 1.0)
    assert within("x", 0.0, 1.0)
    assert seen[0].size == 1.0
    assert len(seen) == 2


def test_practices_see_loss_norm_and_curve() -> None:
    log = [{"loss": 1.0, "grad_norm": 1.0}, {"loss": 0.009, "grad_norm": 0.1}]
    assert is_overfit(log)
    assert not is_overfit([*log, {"loss": 0.011, "grad_norm": 0.1}])
    assert not is_overfit([{"loss": 1.0, "grad_norm": float("nan")}, log[1]])
    assert follows(log, log)
    assert not follows([{"loss": 1.002, "grad_norm": 1.0}, log[1]], log)


def test_readme_shows_the_table_of_the_kill_matrix() -> None:
    readme, matrix = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/kill-matrix.md"))
    begin = matrix.index("| practice |")
    assert matrix[begin : matrix.index("\n\n", begin)] in readme
