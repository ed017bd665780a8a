"""What recording costs: steps of a run that is recorded against those of the same run without, one after the other.

Run: pytest tests/bench/bench_recording.py -o python_files=bench_*.py
On the built-in base, and on one of hidden size 1,024 with 8 layers and GLM-4's vocabulary of 151,552. A recorded step
is at most 1.5 times a plain one on the built-in base; after the recorded steps nothing is left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Glm4Config, Glm4ForCausalLM

from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.recording.attach import Attachment

RECORDED, AFTER = 4, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


def tiny(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(write_tiny_base(folder / "base"))


def large(folder: Path) -> Any:
    config = Glm4Config(
        vocab_size=151_552, hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128,
    )  # fmt: skip
    return Glm4ForCausalLM(config)


def step_times(base: Any, ids_BT: torch.Tensor, folder: Path | None) -> tuple[list[float], int]:
    """The seconds of each step, and the bytes that the recorder held at the end."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=TARGETS)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    attachment, seconds = Attachment(folder, RECORDED) if folder else None, []
    for _ in range(RECORDED + AFTER):
        began_s = time.perf_counter()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began_s)
    held = attachment.recorder.trace.num_bytes if attachment and attachment.recorder else 0
    if attachment:
        attachment.close()
    model.unload()
    return seconds, held


@pytest.mark.benchmark(group="recording")
@pytest.mark.parametrize(("make", "length", "rounds", "limit"), [(tiny, 64, 9, 1.5), (large, 64, 2, None)])
def test_recorded_step_against_a_plain_one(
    make: Callable[[Path], Any], length: int, rounds: int, limit: float | None, benchmark: Any, tmp_path: Path
) -> None:
    base = make(tmp_path)
    ids_BT = torch.randint(3, base.config.vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    ratios: list[list[float]] = []
    held = 0

    def round_() -> None:
        nonlocal held
        plain, _ = step_times(base, ids_BT, None)
        recorded, held = step_times(base, ids_BT, tmp_path / f"recording-{len(ratios)}")
        ratios.append([a / b for a, b in zip(recorded, plain, strict=True)])

    benchmark.pedantic(round_, rounds=rounds, warmup_rounds=1)
    during = statistics.median(ratio for one in ratios[1:] for ratio in one[1:RECORDED])  # without the set-up
    after = statistics.median(ratio for one in ratios[1:] for ratio in one[RECORDED:])
    benchmark.extra_info.update({
        "recorded / plain": round(during, 3), "afterwards / plain": round(after, 3),
        "recorder MB": round(held / 1e6, 1),
    })  # fmt: skip
    print(f"\n{make.__name__}: a recorded step takes {during:.2f} times a plain one, {after:.2f} afterwards; ", end="")
    print(f"the recorder holds {held / 1e6:.1f} MB")
    assert limit is None or during <= limit
