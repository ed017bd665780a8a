"""Runs of one process and of several, launched as users launch them, and what it means that they are the same.

One process with as many times the accumulation takes the same rows in each step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from glm4ft.train.config import TrainConfig
from glm4ft.train.run import run_training
from glm4ft.train.run_folder import last_checkpoint
from glm4ft.train.trajectory import Trajectory, read_trajectory

PROCESSES = int(os.environ.get("GLM4FT_PROCESSES", "2"))
DRIVER = Path(__file__).with_name("in_processes.py")
CONFIG = TrainConfig(max_steps=20, eval_every=7, save_every=5, micro_batch_size=2)
# Measured with torch 2.13 on two gloo processes, padded: at most 1.4e-6 of any figure, 3.1e-7 of any adapter matrix,
# where the sums of fp32 are taken in another order.
FIGURES, WEIGHTS = 1e-5, 1e-5


def talks(path: Path, num_talks: int) -> str:
    """Conversations of different lengths and shares of supervised tokens."""
    records = [
        [("user", f"question {i} " + "why " * (7 * i % 11)), ("assistant", f"answer {i} " + "so " * (5 * i % 13))]
        for i in range(num_talks)
    ]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in record]}) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


class Launches:
    """The runs of one process, and what the launchers made of the same commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Nine rows in micro-batches of two: in the last step of an epoch one process has half a micro-batch, and the
        # other no row and so no target. Five rows in evaluations of two.
        data, held_out = talks(folder / "talks.jsonl", 9), talks(folder / "held_out.jsonl", 5)
        self.padded = replace(CONFIG, data=data, eval_data=held_out)
        self.packed = replace(self.padded, packing=True, max_length=96, micro_batch_size=1)
        self.one = {
            name: self.run(replace(config, accumulation=PROCESSES), name)
            for name, config in {"padded": self.padded, "packed": self.packed}.items()
        }

    def run(self, config: TrainConfig, name: str, **kwargs: Any) -> Path:
        """Train in this process."""
        return run_training(replace(config, output=str(self.folder / name)), say=lambda _: None, **kwargs).output

    def stopped(self, name: str, step: int) -> Path:
        """A copy of the run of one process as it was after a checkpoint."""
        output = shutil.copytree(self.one["padded"], self.folder / name)
        for path in [output / "complete", *output.glob("adapter*")]:
            path.unlink()
        shutil.rmtree(output / "checkpoint-20")
        assert last_checkpoint(output) == output / f"checkpoint-{step}"
        return output

    def job(self, config: TrainConfig, name: str, **fault: Any) -> dict[str, Any]:
        """The command that trains into a folder of that name."""
        options = {**vars(config), "output": str(self.folder / name), "lora": {}}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in options.items() if v not in (None, {}, [])}))
        return {"argv": ["train", f"--config={path}"], **fault}

    def launch(self, *launcher: str, jobs: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
        """Run commands in the processes of a launcher."""
        path = self.folder / "jobs.json"
        path.write_text(json.dumps(jobs))
        command = [sys.executable, "-m", *launcher, str(DRIVER), str(path)]
        return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)


def require_equal(output: Path, one: Path) -> None:
    """Two runs are the same to rounding, and each step and evaluation was written once."""
    ran, expected = (read_trajectory(folder / "trajectory.jsonl") for folder in (output, one))
    assert [row["step"] for row in ran.steps] == list(range(1, 21))
    for exact in ("lr", "supervised_tokens", "tokens", "clipped"):
        assert column(ran, exact) == column(expected, exact)
    assert column(ran, "loss") == pytest.approx(column(expected, "loss"), rel=FIGURES)
    assert column(ran, "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=FIGURES)
    assert [row["step"] for row in ran.evaluations] == [row["step"] for row in expected.evaluations] == [7, 14, 20]
    losses = [[row["eval_loss"] for row in trajectory.evaluations] for trajectory in (ran, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=FIGURES)
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (output, one))
    assert weights.keys() == others.keys()
    assert max(float((weights[n] - others[n]).norm() / others[n].norm()) for n in others) < WEIGHTS


def column(trajectory: Trajectory, name: str) -> list[Any]:
    return [row[name] for row in trajectory.steps]
