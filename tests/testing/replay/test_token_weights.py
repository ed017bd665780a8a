"""Weights of single tokens reach the gradient as they are stated, however the weighted sum is divided.

Run: pytest tests/testing/replay/test_token_weights.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4ft.testing.faults.registry import all_faults
from glm4ft.testing.faults.token_weights import Weighted
from glm4ft.testing.faults.variations import all_variations
from glm4ft.testing.replay.replay import Verdict
from glm4ft.testing.specification.reference import Reference
from glm4ft.testing.trial.recorded import judge_recording
from glm4ft.testing.trial.runner import run_check
from glm4ft.testing.trial.trial import Trial

sys.path.insert(0, str(Path(__file__).parents[2] / "sweeps"))
import record_faults

PLAN = {"accumulation": 2, "steps": 2, "schedule": "linear"}


def trial_of(kind: Any, healthy: Trial, folder: Path) -> Trial:
    return Trial(kind(str(healthy.base_dir)), healthy.base_dir, folder)


def verdict_on(kind: Any, healthy: Trial, folder: Path) -> Verdict:
    return trial_of(kind, healthy, folder).run(**PLAN).verdict


@pytest.mark.parametrize("id", ["token-weights", "token-weights-over-the-count"])
def test_weights_that_are_applied_as_stated_agree(id: str, healthy: Trial, tmp_path: Path) -> None:
    verdict = verdict_on(all_variations()[id].subject, healthy, tmp_path)
    assert verdict.departures == {}
    assert 0 < verdict.largest["gradient"] < 1e-5


@pytest.mark.parametrize(
    "id",
    [
        "token-weights-ignored",
        "token-weights-not-shifted",
        "token-weights-applied-twice",
        "token-weights-mean-of-micro-means",
    ],
)
def test_weights_that_are_applied_otherwise_are_told_with_the_way(id: str, healthy: Trial, tmp_path: Path) -> None:
    fault = all_faults()[id]
    departure = verdict_on(fault.subject, healthy, tmp_path).departures["gradient"]
    assert departure.step == 1
    assert re.search(fault.cause, departure.cause), departure


def test_a_token_without_weight_is_not_supervised(healthy: Trial, tmp_path: Path) -> None:
    """A trainer that skips it agrees; one that trains it, with whatever weight, is told at the rows."""

    class Silent(Weighted):
        def encode(self, messages: Any, tools: Any = None) -> Any:
            row = super().encode(messages, tools)
            return {**row, "weights": [w if at % 3 else 0 for at, w in enumerate(row["weights"])]}

    class Trained(Silent):
        def weights_of_targets(self, batch: Any) -> torch.Tensor:
            return super().weights_of_targets(batch).clamp_min(1)

    (tmp_path / "a").mkdir()
    assert verdict_on(Silent, healthy, tmp_path / "a").departures == {}
    departure = verdict_on(Trained, healthy, tmp_path / "b").departures["rows"]
    assert "are trained that should be ignored" in departure.text


def test_loss_with_weights_is_their_sum(healthy: Trial) -> None:
    reference: Reference = healthy.reference
    ids, labels = row = healthy.rows(healthy.demo)[0]
    trained = healthy.run(**PLAN).trained
    plain = float(reference.loss([row], trained))
    ones = torch.tensor([float(label >= 0) for label in labels], dtype=torch.float64)
    assert float(reference.loss([row], trained, weights=[ones])) == pytest.approx(plain * float(ones[1:].sum()))
    last = torch.zeros(len(ids), dtype=torch.float64)
    last[-1] = 2.0
    assert float(reference.loss([row], trained, weights=[last])) == pytest.approx(
        2 * float(reference.nll(ids, trained)[-1])
    )


@pytest.mark.parametrize("weights", [[], [1.0], [-1.0] * 1000, [float("nan")] * 1000])
def test_weights_that_are_no_weights_fail_at_the_rows(weights: list[float], healthy: Trial, tmp_path: Path) -> None:
    class Wrong(Weighted):
        def encode(self, messages: Any, tools: Any = None) -> Any:
            row = super().encode(messages, tools)
            return {**row, "weights": weights[: len(row["input_ids"])]}

    from glm4ft.testing.checks import all_checks

    (check,) = [c for c in all_checks() if c.name.startswith("lists_have_one_length")]
    result = run_check(check, trial_of(Wrong, healthy, tmp_path))
    assert result.status == "failed"
    assert "weights of tokens" in result.message


def test_recorded_run_with_weights_is_not_judged_by_equal_ones(tmp_path: Path, healthy: Trial) -> None:
    """A recording does not say which weights were asked for: the gradient is not judged, and everything else is."""
    data = tmp_path / "data.jsonl"
    record_faults.write_data(data)
    arguments = ["token-weights", "accumulated", str(healthy.base_dir), str(data), str(tmp_path / "output")]
    record_faults._record(tmp_path / "recording", arguments, False, 0)
    found = judge_recording(tmp_path / "recording", data=data)
    assert found.verdict.departures == {}
    assert "which weights were asked for" in found.not_judged["gradient"]
    assert "update" not in found.not_judged
