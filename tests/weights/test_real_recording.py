"""A training command on real weights is recorded as it is, and judged by the checkpoint's own template.

Run: tox run -e weights -- -k recording
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm4ft.testing.recording.attach import record_run
from glm4ft.testing.trial.recorded import judge_recording
from glm4ft.train.config import TrainConfig
from glm4ft.train.run import run_training

pytestmark = pytest.mark.weights

TALKS = [
    ["Which river runs through Paris?", "The Seine.", "And London?", "The Thames."],
    ["Name a prime above ten.", "Eleven is one."],
    ["Say hello in French.", "Bonjour! That is hello in French."],
    ["What is 2 + 2?", "4"],
]


def test_recorded_run_agrees_at_every_stage(base: Path, tmp_path: Path) -> None:
    data, roles = tmp_path / "talks.jsonl", ("user", "assistant")
    talks = [[{"role": roles[i % 2], "content": text} for i, text in enumerate(talk)] for talk in TALKS]
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), "utf-8")
    config = TrainConfig(
        model=str(base), data=str(data), output=str(tmp_path / "run"), max_steps=3, accumulation=2, micro_batch_size=1
    )
    with record_run(tmp_path / "recording", 2):
        run_training(config, say=lambda _: None)
    found = judge_recording(tmp_path / "recording", str(base), data)
    assert found.verdict.departures == {}
    assert not {"rows", "batches", "model", "gradient", "clipping", "schedule", "update"} & found.not_judged.keys()
    assert 0 < found.verdict.largest["gradient"] <= found.verdict.limits["gradient"]
    assert len(found.rows) == len(TALKS)
