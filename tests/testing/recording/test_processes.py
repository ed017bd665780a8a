"""Runs of several processes are recorded and judged over all of them: DistributedDataParallel and FSDP2.

Run: pytest tests/testing/recording/test_processes.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from glm4ft.cli.main import run
from glm4ft.errors import InputError
from glm4ft.testing.trial.recorded import judge_recording
from glm4ft.testing.trial.trial import Trial

pytestmark = pytest.mark.slow

NUM_PROCESSES, STEPS = 2, 3
SCRIPT = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed import all_reduce, destroy_process_group, get_rank, get_world_size, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

base, kind, fault = sys.argv[1:]
init_process_group("gloo")
torch.manual_seed(0)
lora = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"])
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).train()
if kind == "fsdp2":
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
else:
    model = DistributedDataParallel(model)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
for step in range(3):
    share = 0 if fault == "one share for all" else get_rank()
    generator = torch.Generator().manual_seed(10 * step + share)
    ids = torch.randint(20, 60, (1, 12 + 5 * share), generator=generator)  # the last process has more tokens
    labels = ids.clone()
    labels[:, :4] = -100
    own = count = torch.tensor(float((labels[:, 1:] != -100).sum()))
    if fault != "own means":
        count = own.clone()
        all_reduce(count)
        count /= get_world_size()  # the wrapper takes the mean over the processes
    called = model.module if fault == "wrapper bypassed" else model
    logits = called(input_ids=ids).logits[0, :-1]
    (torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / count).backward()
    torch.nn.utils.clip_grad_norm_(trained, 0.05)
    optimizer.step()
    optimizer.zero_grad()
destroy_process_group()
"""


def recorded(base: Path, folder: Path, kind: str, fault: str, num_processes: int = NUM_PROCESSES) -> Path:
    """Record the script in several processes, as ``torchrun`` starts them."""
    script, recording = folder / "script.py", folder / f"{kind}-{fault}"
    script.write_text(SCRIPT, "utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [*torchrun, str(script), str(base), kind, fault]
    with pytest.raises(SystemExit, match="0"):
        run(["record", "--steps", str(STEPS), "--output", str(recording), "--", *command])
    return recording


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_mean_over_processes_is_told_and_nothing_else(healthy: Trial, tmp_path: Path, kind: str) -> None:
    """Each process takes the mean of its own tokens; the ranks' tensors are whole again, and all other stages agree."""
    found = judge_recording(recorded(healthy.base_dir, tmp_path, kind, "own means"))
    assert list(found.verdict.departures) == ["gradient"]
    departure: Any = found.verdict.departure
    assert "mean over processes" in departure.cause
    assert found.num_processes == NUM_PROCESSES
    assert {"model", "clipping", "update"} <= found.verdict.largest.keys()


def test_gradients_that_are_not_averaged_are_told_at_the_first_step(healthy: Trial, tmp_path: Path) -> None:
    """Only the gradient departs: that each process clips and applies another one follows from it."""
    found = judge_recording(recorded(healthy.base_dir, tmp_path, "ddp", "wrapper bypassed"))
    assert list(found.verdict.departures) == ["gradient"]
    departure: Any = found.verdict.departure
    assert departure.step == 1
    assert "not averaged over the processes" in departure.cause
    assert "different gradients" in found.reason("clipping")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_shares_that_overlap_are_told_with_the_processes(healthy: Trial, tmp_path: Path, kind: str) -> None:
    """Every process trains on the same rows: a row is seen twice before others are seen at all."""
    found = judge_recording(recorded(healthy.base_dir, tmp_path, kind, "one share for all"))
    departure: Any = found.verdict.departure
    assert departure.stage == "batches"
    assert "by processes 0, 1" in departure.text
    assert "shares overlap" in departure.cause


def test_four_processes_agree(healthy: Trial, tmp_path: Path) -> None:
    found = judge_recording(recorded(healthy.base_dir, tmp_path, "ddp", "none", 4))
    assert found.verdict.departures == {}
    assert (found.num_processes, len(found.rows)) == (4, 4 * STEPS)
    assert found.verdict.largest["gradient"] > 0


def test_token_mean_under_fsdp2_agrees_and_needs_every_process(healthy: Trial, tmp_path: Path) -> None:
    recording = recorded(healthy.base_dir, tmp_path, "fsdp2", "none")
    found = judge_recording(recording)
    assert found.verdict.departures == {}
    assert found.verdict.largest["gradient"] > 0
    stored = json.loads((recording / "rank-1" / "trace.json").read_text("utf-8"))
    assert set(stored["sharded"]) == set(stored["trained"])
    (recording / "rank-1" / "trace.json").unlink()
    with pytest.raises(InputError, match="split over the processes"):
        judge_recording(recording)
