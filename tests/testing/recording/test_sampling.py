"""Full fine-tuning of a large model is recorded by a sample of entries: a small trace that still tells faults apart.

Run: pytest tests/testing/recording/test_sampling.py
The built-in base counts as large here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from glm4ft.testing.recording import sampling
from glm4ft.testing.recording.attach import COPIES, record_run
from glm4ft.testing.trial.recorded import JudgedRecording, judge_recording
from glm4ft.testing.trial.trial import Trial

SAMPLE, STEPS = 128, 3
Change = Callable[[Any], None]


@pytest.fixture(autouse=True)
def every_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WHOLE", 0)
    monkeypatch.setattr(sampling, "SAMPLE", SAMPLE)


def nothing(model: Any) -> None:
    """The healthy run."""


def judged(
    base: Path, folder: Path, *, build: Change = nothing, clip: Change | None = None, update: Change = nothing
) -> JudgedRecording:
    """Train all parameters of a base, with a change to the model, to the clipping, or to what an update leaves."""
    model = AutoModelForCausalLM.from_pretrained(base).train()
    build(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    with record_run(folder, STEPS):
        for step in range(STEPS + 1):
            for part in range(2):
                generator = torch.Generator().manual_seed(10 * step + part)
                ids = torch.randint(20, 60, (2, 24), generator=generator)
                (model(input_ids=ids, labels=ids).loss / 2).backward()
            if clip:
                clip(model)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            update(model)
            optimizer.zero_grad()
    return judge_recording(folder, str(base))


def test_trace_stays_small_and_agrees(healthy: Trial, tmp_path: Path) -> None:
    """Of each step there are at most four copies of a sample of each tensor, and what the forward passes hold."""
    found = judged(healthy.base_dir, tmp_path / "run")
    assert found.verdict.departures == {}
    assert found.verdict.largest["gradient"] > 0
    assert {"model", "gradient", "clipping", "update"} <= found.verdict.largest.keys()
    model = AutoModelForCausalLM.from_pretrained(healthy.base_dir)
    kept = sum(min(SAMPLE, p.numel()) for p in model.parameters())
    forward = 2 * 2 * 24 * (2 * 4 * model.config.hidden_size + 2 * 8)  # hidden states and gradients, ids and positions
    assert found.about["overhead"]["trace_bytes"] <= STEPS * (COPIES * 4 * kept + forward)
    assert kept < sum(p.numel() for p in model.parameters()) / 10
    files = (tmp_path / "run" / "rank-0").glob("*.safetensors")
    assert sum(file.stat().st_size for file in files) < 1.2 * STEPS * (COPIES * 4 * kept + forward)


def halve_one(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.register_hook(lambda gradient: gradient / 2)


def raise_one_row(model: Any) -> None:
    """The embeddings of most tokens have no gradient, so the sample says little of theirs."""
    factor = torch.ones(model.config.vocab_size, 1)
    factor[25] = 1.5
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * factor)


def round_all(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())


def by_value(model: Any) -> None:
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def draw_anew(model: Any) -> None:
    torch.manual_seed(1)
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.weight, std=0.02)


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("model", {"build": draw_anew}),
        ("gradient", {"build": halve_one}),
        ("gradient", {"build": raise_one_row}),
        ("clipping", {"clip": by_value}),
        ("update", {"update": round_all}),
    ],
    ids=["weights drawn anew", "one gradient halved", "one row of a gradient", "clipped by value", "rounded weights"],
)
def test_faults_of_each_stage_are_told(healthy: Trial, tmp_path: Path, stage: str, change: dict[str, Any]) -> None:
    found = judged(healthy.base_dir, tmp_path / "run", **change)
    assert found.verdict.departure is not None
    assert found.verdict.departure.stage == stage
