"""The most memory that a trainer holds while it trains two steps, each in a process of its own.

Run: pytest tests/bench/bench_memory.py -o python_files=bench_*.py       (Linux; without TRL it is left out)
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from bench_training_step import CASES, TRAINERS, Case, steps

STEPS = 2


def peak_bytes(name: str, case: Case, folder: Path) -> int:
    """The peak of a process that trains, libraries and weights included."""
    step = steps(TRAINERS[name](case, folder))
    for _ in range(STEPS):
        step()
    # not ru_maxrss, which begins at the size of the process that started this one
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.benchmark(group="peak memory")
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_peak_memory(benchmark: Any, tmp_path: Path, case: Case) -> None:
    peaks: dict[str, int] = {}

    def round_() -> None:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks.update({name: pool.apply(peak_bytes, (name, case, tmp_path / name)) for name in TRAINERS})

    benchmark.pedantic(round_, rounds=1)
    benchmark.extra_info.update({f"{name} MB": round(peak / 1e6) for name, peak in peaks.items()})
    print(f"\n{case}: peak memory " + ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in peaks.items()))
