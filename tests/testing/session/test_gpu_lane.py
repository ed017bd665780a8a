"""The GPU lane: all checks in bf16 and fp32 on the given base, or a reduced set on a base of the true size.

Run: pytest tests/testing/session/test_gpu_lane.py -m gpu --glm4ft-model=PATH
With --glm4ft-device=cpu the same tests run on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from glm4ft.testing.bases.geometry import GEOMETRIES
from glm4ft.testing.checks import all_checks
from glm4ft.testing.conformance import Trials, parametrize_with_checks
from glm4ft.testing.session.gpu_lane import REDUCED, Bases, describe_lane, is_large, why_left_out
from glm4ft.testing.trial.heavy_bases import OVERFIT_STEPS
from glm4ft.testing.trial.runs import RecordedRun


@pytest.mark.gpu
@parametrize_with_checks(dtypes=("bf16", "fp32"))
def test_a_pipeline_conforms_on_a_gpu(glm4ft_check: Callable[[], None]) -> None:
    glm4ft_check()


def test_the_reduced_set_names_checks_of_every_stage() -> None:
    """A check that is renamed must not drop out of the reduced set."""
    checks = {check.name: check.stage for check in all_checks()}
    assert set(checks) >= REDUCED
    assert {checks[name] for name in REDUCED} == set(checks.values())


@pytest.mark.parametrize("spec", ["random:glm-4-9b", "random:glm-4-32b-0414", "zai-org/GLM-4-9B-0414"])
def test_a_base_of_the_true_size_gets_the_reduced_set(spec: str) -> None:
    """A base of unknown size gets it too, so that the suite does not take hours."""
    assert is_large(spec)
    assert why_left_out(spec, "mask_reaches_the_loss", "bf16") == ""
    assert "reduced set" in why_left_out(spec, "processes_train_as_one_process_would", "bf16")
    assert f"reduced set of {len(REDUCED)} checks" in describe_lane(spec)


def test_a_small_base_gets_every_check_in_both_dtypes() -> None:
    reasons = {why_left_out("tiny", check.name, dtype) for check in all_checks() for dtype in ("bf16", "fp32")}
    assert reasons == {""}


def test_a_checkpoint_is_judged_in_the_dtype_that_it_is_stored_in(tmp_path: Path) -> None:
    config = {**GEOMETRIES["glm-4-9b"], "architectures": ["GlmForCausalLM"], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_large(str(tmp_path))
    assert "stored in bf16" in why_left_out(str(tmp_path), "mask_reaches_the_loss", "fp32")
    assert why_left_out(str(tmp_path), "mask_reaches_the_loss", "bf16") == ""
    assert why_left_out(str(tmp_path), "mask_reaches_the_loss", "") == ""


def test_on_a_large_base_learning_rate_and_steps_differ_and_models_are_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one model fits beside the specification; that of the overfit run is kept for the later checks."""
    monkeypatch.setattr("glm4ft.testing.session.gpu_lane.LARGE", 0)
    trials = Trials(Bases("tiny", tmp_path / "bases"), tmp_path, "glm4ft.testing.subjects.own:Subject")
    check = next(check for check in all_checks() if check.name == "prefix_occurs_once")
    trial = trials.trial(trials.default_subject, "")
    assert trial.standard["learning_rate"] < 5e-3
    trace = SimpleNamespace(steps=[])
    for key in (["short", {}], ["demo", {"steps": OVERFIT_STEPS}]):
        trial._runs[json.dumps(key)] = RecordedRun({}, [], trace, [], "a model", None)  # type: ignore[arg-type]
    assert trials.run(check, trials.default_subject, "", {}).status == "passed"
    assert [run.model for run in trial._runs.values()] == [None, "a model"]
