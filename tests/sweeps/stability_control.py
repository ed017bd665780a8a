"""Gradient norms as a control: does the spike ratio tell the right mask from the founding bug?

Run: python tests/sweeps/stability_control.py [--seeds 6]
Prints, for 150 steps at a rate of 2e-2 on the two bundled conversations, the largest ratio of a step's norm to the
running median of the 20 steps before it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from glm4ft.data.inputs import DEMO_DATA
from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.stability import spike_ratios
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects import founding_bug, own

STEPS, LEARNING_RATE = 150, 2e-2


def largest_ratio(subject: Any, base_dir: Path, seed: int, steps: int = STEPS) -> float:
    """Largest spike of a run on the bundled conversations."""
    talks = [json.loads(line) for line in DEMO_DATA.read_text("utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as output:
        plan = make_plan(steps=steps, learning_rate=LEARNING_RATE, seed=seed, output_dir=output)
        log = subject.train(subject.build_model(str(base_dir), seed), talks, plan)
    return max(spike_ratios([entry["grad_norm"] for entry in log if "grad_norm" in entry]))


def main() -> None:
    """Print a line per seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=6)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        base_dir = write_tiny_base(name)
        subjects = own.Subject(str(base_dir)), founding_bug.Subject(str(base_dir))
        for seed in range(parser.parse_args().seeds):
            right, wrong = (largest_ratio(subject, base_dir, seed) for subject in subjects)
            print(f"seed {seed}: right mask {right:.2f}, founding bug {wrong:.2f}", flush=True)


if __name__ == "__main__":
    main()
