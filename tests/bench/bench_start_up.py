"""From the command to the first step: ``glm4ft train`` on its demo, beside the import of the libraries it trains with.

Run: pytest tests/bench/bench_start_up.py -o python_files=bench_*.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

LIBRARIES = "import torch, peft; from transformers import Trainer"


def seconds_to_first_step(output: Path) -> float:
    """Seconds until the first step is in the trajectory."""
    began_s = time.perf_counter()
    options = ["--output", str(output), "--max_steps", "1", "--round_trip", "false"]
    command = [sys.executable, "-m", "glm4ft", "train", *options]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    trajectory = output / "trajectory.jsonl"
    while not (trajectory.exists() and '"type": "step"' in trajectory.read_text("utf-8")):
        assert running.poll() is None, "the run ended without a step"
        time.sleep(0.02)
    seconds = time.perf_counter() - began_s
    running.wait()
    return seconds


def seconds_to_import() -> float:
    """Seconds that a process needs to import the libraries and to end."""
    began_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", LIBRARIES], check=True)
    return time.perf_counter() - began_s


@pytest.mark.benchmark(group="start-up")
def test_first_step_of_the_demo(benchmark: Any, tmp_path: Path) -> None:
    first_step, imports = list[float](), list[float]()

    def round_() -> None:
        imports.append(seconds_to_import())
        first_step.append(seconds_to_first_step(tmp_path / str(len(first_step))))

    benchmark.pedantic(round_, rounds=4, warmup_rounds=1)
    benchmark.extra_info.update({
        "first step s": [round(found, 2) for found in sorted(first_step[1:])],
        "import of the libraries s": [round(found, 2) for found in sorted(imports[1:])],
    })  # fmt: skip
    print(f"\nfirst step after {statistics.median(first_step[1:]):.1f} s, ", end="")
    print(f"of which the import of torch, peft and transformers.Trainer takes {statistics.median(imports[1:]):.1f} s")
