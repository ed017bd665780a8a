"""How far clean runs are from the specification: the figures that the limits of the replay stand on.

Run: python tests/sweeps/clean_departures.py [--subject MODULE:ATTR] [--seeds 20] [--first-seed 0]
Prints the largest relative departure of each stage over all seeds, padded and packed, 1, 2 and 4 micro-batches per
step, clipping on and off, and where it was; exits with 1 if any run departs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.replay.replay import Departure
from glm4ft.testing.subject import load_subject
from glm4ft.testing.trial.trial import Trial

STEPS = 10


@dataclass
class Sweep:
    """What the runs showed.

    Args:
        runs: how many there were.
        largest: stage to the largest relative departure, and the plan it came with.
        alarms: plans whose run departed, with the departure.
    """

    runs: int = 0
    largest: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)
    alarms: list[tuple[dict[str, Any], Departure]] = field(default_factory=list)


def plans(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every combination; packs go through the model one at a time."""
    for seed, packing, accumulation, max_grad_norm in product(seeds, (False, True), (1, 2, 4), (0.5, 0)):
        size = 1 if packing or accumulation == 4 else 2
        yield {
            "steps": STEPS,
            "seed": seed,
            "packing": packing,
            "micro_batch_size": size,
            "accumulation": accumulation,
            "max_grad_norm": max_grad_norm,
        }


def clean_departures(subject: Any, base_dir: Path, folder: Path, seeds: Sequence[int]) -> Sweep:
    """Replay a healthy subject under every plan.

    Args:
        subject: that is believed to be healthy.
        base_dir: that it was made on.
        folder: for what it writes.
        seeds: of the runs.
    """
    sweep, trial = Sweep(), Trial(subject, base_dir, folder)
    for plan in plans(seeds):
        verdict = trial.run_anew(**plan).verdict
        sweep.runs += 1
        for stage, size in verdict.largest.items():
            if size >= sweep.largest.get(stage, (-1.0, {}))[0]:
                sweep.largest[stage] = size, plan
        if verdict.departure:
            sweep.alarms.append((plan, verdict.departure))
    return sweep


def main() -> int:
    """Sweep and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--subject", default="glm4ft.testing.subjects.own:Subject")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base_dir = write_tiny_base(folder / "base")
        subject = load_subject(options.subject, base_dir)
        sweep = clean_departures(
            subject, base_dir, folder, range(options.first_seed, options.first_seed + options.seeds)
        )
    print(f"{options.subject}: {sweep.runs} runs of {STEPS} steps, {len(sweep.alarms)} alarms")
    for stage, (size, plan) in sweep.largest.items():
        print(f"  {stage:<10}{size:.1e}  {plan}")
    for plan, departure in sweep.alarms:
        print(f"  ALARM {departure}  {plan}")
    return int(bool(sweep.alarms))


if __name__ == "__main__":
    raise SystemExit(main())
