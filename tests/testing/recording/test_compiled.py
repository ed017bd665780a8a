"""Compiled models are recorded: the numbers of the run stay the same, and nothing is said on its terminal.

Run: pytest tests/testing/recording/test_compiled.py
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from glm4ft.testing.recording.attach import record_run
from glm4ft.testing.replay.matching import KnownRows
from glm4ft.testing.trial.leaks import watch_leaks
from glm4ft.testing.trial.recorded import judge_recording
from glm4ft.testing.trial.trial import Trial

STEPS = 2
COMPILER = "aot_eager"  # the compiler's whole front, without the C++ compiler that not every machine has


def trained(base: Path, how: str, recording: Path | None) -> dict[str, torch.Tensor]:
    """Train adapters for a few steps; returns them."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    lora = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if how == "wrapped":
        model = torch.compile(model, backend=COMPILER)
    else:
        model.compile(backend=COMPILER)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    with record_run(recording, STEPS) if recording else contextlib.nullcontext():
        for step in range(STEPS + 1):
            ids = torch.randint(20, 60, (2, 24), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_model_is_recorded_without_a_trace_in_the_run(
    healthy: Trial, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        recorded = trained(healthy.base_dir, how, tmp_path / "recording")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("torch")] == []
    found = judge_recording(tmp_path / "recording", str(healthy.base_dir))
    assert (found.num_steps, found.verdict.departures) == (STEPS, {})
    plain = trained(healthy.base_dir, how, None)
    assert all(torch.equal(recorded[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_rows_of_a_compiled_model_are_measured_for_leaks(healthy: Trial) -> None:
    """Each row takes a backward pass of its own, for which a compiled one would have given its buffers away."""
    torch._dynamo.reset()
    lora = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(healthy.base_dir), lora).train()
    ids = torch.randint(20, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    rows = [(tuple(row), tuple(row)) for row in ids.tolist()]
    with watch_leaks(model, KnownRows(rows)) as leaks:
        compiled = torch.compile(model, backend=COMPILER, dynamic=True)
        compiled(input_ids=ids, labels=ids).loss.backward()
    assert [(leak.size, leak.neighbours) for leak in leaks] == [(0.0, 1), (0.0, 1)]
