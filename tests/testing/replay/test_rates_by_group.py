"""Learning rates by group (LoRA+) are judged as they are stated, and a resumed run keeps each of them.

Run: pytest tests/testing/replay/test_rates_by_group.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from glm4ft.errors import ConfigError
from glm4ft.testing.faults.rates_by_group import LoraPlus
from glm4ft.testing.faults.registry import all_faults
from glm4ft.testing.replay.replay import Verdict
from glm4ft.testing.subjects.plain_loop import LoopState
from glm4ft.testing.trial.same_run import describe_divergence
from glm4ft.testing.trial.trial import Trial

PLAN = {"steps": 4, "schedule": "linear", "warmup_steps": 1}


def trial_of(kind: Any, healthy: Trial, folder: Path) -> Trial:
    return Trial(kind(str(healthy.base_dir)), healthy.base_dir, folder)


def verdict_on(kind: Any, healthy: Trial, folder: Path) -> Verdict:
    return trial_of(kind, healthy, folder).run(**PLAN).verdict


def test_rates_that_are_applied_as_stated_agree(healthy: Trial, tmp_path: Path) -> None:
    verdict = verdict_on(LoraPlus, healthy, tmp_path)
    assert verdict.departures == {}
    assert verdict.largest["update"] < 1e-5


@pytest.mark.parametrize("id", ["lora-plus-ignored", "lora-plus-not-scheduled", "lora-plus-on-a"])
def test_rates_that_are_applied_otherwise_are_told_with_the_way(id: str, healthy: Trial, tmp_path: Path) -> None:
    fault = all_faults()[id]
    verdict = verdict_on(fault.subject, healthy, tmp_path)
    assert set(verdict.departures) == {"schedule"}
    assert re.search(fault.cause, verdict.departures["schedule"].cause), verdict.departures


def test_rates_that_nobody_stated_are_told(healthy: Trial, tmp_path: Path) -> None:
    class Unstated(LoraPlus):
        learning_rate_factors: Any = None

        def set_rate(self, run: LoopState) -> None:
            super(LoraPlus, self).set_rate(run)
            run.optimizer.param_groups[1]["lr"] *= 16

    departure = verdict_on(Unstated, healthy, tmp_path).departures["schedule"]
    assert "0.08, not 0.005" in departure.text


@pytest.mark.parametrize("factor", [0, -1, float("nan")])
def test_a_factor_that_is_none_is_refused(factor: float, healthy: Trial, tmp_path: Path) -> None:
    trial = trial_of(LoraPlus, healthy, tmp_path)
    trial.subject.learning_rate_factors = {"lora_B": factor}
    with pytest.raises(ConfigError, match=f"lora_B: {factor}"):
        trial.stated_rates  # noqa: B018


def test_divergence_names_the_rates_of_all_groups(healthy: Trial, tmp_path: Path) -> None:
    class Plain(LoraPlus):
        def set_rate(self, run: LoopState) -> None:
            super(LoraPlus, self).set_rate(run)

    (tmp_path / "a").mkdir()
    runs = [trial_of(kind, healthy, tmp_path / kind.__name__).run(steps=2) for kind in (LoraPlus, Plain)]
    assert describe_divergence(*runs) == "the learning rate at step 1 is 0.005 and 0.005, not 0.005 and 0.02"
