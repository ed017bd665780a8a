"""On a base that is not tiny no run keeps its model, and what a trace holds twice is kept once.

Run: pytest tests/testing/trial/test_heavy_bases.py
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm4ft.model.checkpoint import TINY_GLM4_IDS
from glm4ft.testing.recording.trace_file import STEP_TENSORS
from glm4ft.testing.trial import heavy_bases
from glm4ft.testing.trial.conversations import all_conversations
from glm4ft.testing.trial.heavy_bases import OVERFIT_STEPS, is_heavy, spare
from glm4ft.testing.trial.plans import NAMED, PLANS
from glm4ft.testing.trial.trial import Trial


def trial_of(base: str, **subject: Any) -> Trial:
    return Trial(SimpleNamespace(**subject), Path(), Path(), "", base)


def test_base_is_heavy_by_the_bytes_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    assert not is_heavy(tmp_path)
    monkeypatch.setattr(heavy_bases, "HEAVY_BYTES", 9)
    assert is_heavy(tmp_path)


@pytest.mark.parametrize(("base", "slow"), [("a/folder", True), (TINY_GLM4_IDS, False)])
def test_pretrained_base_learns_more_slowly_than_a_built_in_one(base: str, slow: bool) -> None:
    trial = trial_of(base)
    spare(trial)
    assert not trial.keeps_models
    assert trial.asked(PLANS) == list(NAMED if slow else PLANS)
    assert (trial.overfit_steps == OVERFIT_STEPS, bool(trial.standard)) == (slow, slow)


def test_run_whose_model_was_released_is_recorded_again_for_a_check_that_needs_it(
    healthy: Trial, tmp_path: Path
) -> None:
    trial, plan = Trial(healthy.subject, healthy.base_dir, tmp_path), {"steps": 1, "micro_batch_size": 1}
    first = trial.run(**plan)
    assert trial.run_with_model(**plan) is first
    trial.keeps_models = False
    trial.release_models()
    assert first.model is None
    again = trial.run_with_model(**plan)
    assert again.model is not None
    assert trial.run(**plan) is again


def test_equal_tensors_of_a_trace_are_kept_once(healthy: Trial) -> None:
    """The parameters that a step leaves are those that the next one finds; without clipping there is one gradient."""
    first, second = healthy.run(steps=2, micro_batch_size=1, max_grad_norm=0).trace.steps
    assert all(second.before[name] is tensor for name, tensor in first.after.items())
    assert all(first.raw[name] is tensor for name, tensor in first.clipped.items())
    assert any(first.before[name] is not tensor for name, tensor in first.after.items())


def test_recording_on_the_disk_is_the_one_in_memory(healthy: Trial, tmp_path: Path) -> None:
    """Bit by bit, and what two steps share is written once."""
    plan = {"steps": 3, "micro_batch_size": 1, "max_grad_norm": 0}
    trial = Trial(healthy.subject, healthy.base_dir, tmp_path, keeps_models=False)
    steps, expected = trial.run(**plan).trace.steps, healthy.run(**plan).trace.steps
    for step, other in zip(steps, expected, strict=True):
        for part in STEP_TENSORS:
            own, others = getattr(step, part), getattr(other, part)
            assert own.keys() == others.keys()
            assert all(torch.equal(own[name], others[name]) for name in own)
    assert all(steps[1].before[name] is tensor for name, tensor in steps[0].after.items())
    assert all(step.raw[name] is step.clipped[name] for step in steps for name in step.raw)
    size = sum(tensor.nbytes for tensor in steps[0].after.values())
    written = [file.stat().st_size for file in sorted((tmp_path / "trace-0").iterdir())]
    # the parameters at the start, the gradient, the parameters at the end; then without those at the start
    assert [round(bytes_ / size, 1) for bytes_ in written] == [3.0, 2.0, 2.0]
    assert not trial.run(**plan).verdict.departures


def test_subject_may_state_a_single_stop_id() -> None:
    assert trial_of("", stop_ids=7).stop_ids == [7]
    assert trial_of("", stop_ids=(7, 8)).stop_ids == [7, 8]
    assert trial_of("").stop_ids is None


def test_subject_without_a_format_of_the_family_is_given_no_tool_calls() -> None:
    """A template of another family would drop the name of the tool without an error."""
    takes_all = trial_of("", encode=lambda messages, tools=None: {"input_ids": [], "labels": []})
    assert takes_all.data == all_conversations(with_tools=False)
