"""What the comparison with a baseline notices, and how often it is wrong: the figures in docs/baselines.md.

Run: python tests/sweeps/baselines.py {rounding,false-alarms,faults,limits} [--comparisons 400] [--workers 2]

rounding: the largest mean difference of healthy pipelines that only round otherwise; the smallest effects that matter
    stand on it.
false-alarms: comparisons of pipelines that differ in noise alone, each with fresh seeds, and the interval of the rate.
faults: the faults of the catalogue that change any figure of the runs, and whether the comparison alone notices them.
limits: small changes of the optimisation, from large to small, and which of them are noticed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from glm4ft.testing.baseline.compare import Comparison, compare_curves
from glm4ft.testing.baseline.curves import Curve, StepFigures
from glm4ft.testing.baseline.environment import Tier
from glm4ft.testing.baseline.identity import difference, identity_of
from glm4ft.testing.baseline.measure import PLAN, SEEDS, measure_curve
from glm4ft.testing.baseline.sign_flips import LEVEL
from glm4ft.testing.faults.registry import all_faults
from glm4ft.testing.faults.variations import all_variations
from glm4ft.testing.faults.warm import in_parallel, warm_base
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.trial.trial import Trial

PLANS = {"padded": PLAN, "packed": {**PLAN, "packing": True, "micro_batch_size": 1}}
NOISE = 0.05  # relative, of the initial adapters: large beside rounding and beside the smallest effect that matters
LIMITS: dict[str, dict[str, Any]] = {
    "rate 10 % higher": {"learning_rate": 5.5e-3},
    "rate 2 % higher": {"learning_rate": 5.1e-3},
    "rate 0.2 % higher": {"learning_rate": 5.01e-3},
    "weight decay 0.1 for 0.01": {"weight_decay": 0.1},
    "weight decay 0 for 0.01": {"weight_decay": 0.0},
    "second beta 0.99 for 0.999": {"betas": (0.9, 0.99)},
    "second beta 0.995 for 0.999": {"betas": (0.9, 0.995)},
    "first beta 0.91 for 0.9": {"betas": (0.91, 0.999)},
    "epsilon 1e-6 for 1e-8": {"eps": 1e-6},
    "epsilon 1e-7 for 1e-8": {"eps": 1e-7},
    "clipped to 0.99 for 1": {"max_grad_norm": 0.99},
}


class OtherPlan(Subject):
    """A pipeline that trains by another plan than it was given."""

    changes: dict[str, Any] = {}  # noqa: RUF012  # set on each object

    def train(self, model: Any, conversations: Any, plan: Any) -> Any:
        """Train by the changed plan."""
        return super().train(model, conversations, {**plan, **self.changes})


class OneRowLess(Subject):
    """A pipeline that never sees one row in eight, and another one in its place."""

    def epoch_order(self, num_items: int, epoch: int, seed: int, rank: int) -> list[int]:
        """The order of the epoch, with the first item in place of the last."""
        return [0 if i == num_items - 1 else i for i in super().epoch_order(num_items, epoch, seed, rank)]


def curves_of(subject: Any, plan: dict[str, Any], folder: Path) -> tuple[tuple[Curve, ...], Trial]:
    """The curves of a subject under a plan, and the trial that measured them."""
    trial = Trial(subject, warm_base(), folder)
    return tuple(measure_curve(trial, seed, plan) for seed in range(SEEDS)), trial


def against_healthy(task: tuple[str, str]) -> tuple[str, str, Comparison | None, float]:
    """Compare one pipeline with the healthy one.

    Args:
        task: The id of a fault, a variation or a limit, and the name of a plan.
    Returns:
        The task, the comparison (None if no figure differs or the pipeline refuses), and the largest mean difference.
    """
    id, name = task
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        before, healthy = curves_of(Subject(str(warm_base())), dict(PLANS[name]), Path(folder) / "a")
        try:
            now, trial = curves_of(_pipeline(id), dict(PLANS[name]), Path(folder) / "b")
            plan = make_plan(**PLANS[name])
            rows = trial.rows(trial.conversations)
            other = difference(
                identity_of(healthy, plan, healthy.rows(healthy.conversations)),
                identity_of(trial, plan, rows), rows, trial.subject.tokenizer,
            )  # fmt: skip
        except NotImplementedError:
            return id, name, None, 0.0
        except Exception as error:  # a pipeline that stops is noticed
            return id, name, Comparison("not comparable", Tier.SAME_LIBRARIES, f"{type(error).__name__}: {error}"), 0.0
    if other:
        return id, name, Comparison("not comparable", Tier.SAME_LIBRARIES, other), 0.0
    found = compare_curves(before, now, Tier.SAME_LIBRARIES)
    return id, name, None if found.outcome == "identical" else found, largest_mean(before, now)


def _pipeline(id: str) -> Any:
    if id in LIMITS:
        subject = OtherPlan(str(warm_base()))
        subject.changes = LIMITS[id]
        return subject
    if id == "one row in eight dropped":
        return OneRowLess(str(warm_base()))
    known: dict[str, Any] = {**all_faults(), **all_variations()}
    return known[id].subject(str(warm_base()))


def largest_mean(before: tuple[Curve, ...], now: tuple[Curve, ...]) -> float:
    """The largest size of the mean difference of the logarithm of loss or norm; NaN if the lengths differ."""
    if [len(curve.steps) for curve in before] != [len(curve.steps) for curve in now]:
        return math.nan
    logs = [np.log([[[s.loss, s.grad_norm] for s in c.steps] for c in curves]) for curves in (before, now)]
    return float(np.abs((logs[1] - logs[0]).mean(0)).max())


def noisy_comparison(number: int) -> bool:
    """Compare two sets of runs that differ in noise alone, with fresh seeds; returns whether that was an alarm."""
    subject, plan = Subject(str(warm_base())), make_plan(**{**PLAN, "steps": 8})
    before, now = (tuple(_noisy(subject, plan, number * SEEDS + s, side) for s in range(SEEDS)) for side in (0, 1))
    return compare_curves(before, now, Tier.SAME_LIBRARIES).is_alarm


def _noisy(subject: Subject, plan: dict[str, Any], seed: int, side: int) -> Curve:
    """A run whose initial adapters have noise of its own; its figures are those of the healthy loop's log."""
    model = subject.build_model(str(warm_base()), seed)
    noise = torch.Generator().manual_seed(2 * seed + side + 1_000_000)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += NOISE * parameter.abs().mean() * torch.randn(parameter.shape, generator=noise)
    log = subject.train(model, _conversations(), {**plan, "seed": seed})
    return Curve(seed, tuple(StepFigures(e["step"], e["loss"], e["grad_norm"], e["learning_rate"], 0, 0) for e in log))


def _conversations() -> Any:
    from glm4ft.testing.trial.conversations import all_conversations

    return all_conversations()["short"]


def interval(alarms: int, count: int) -> tuple[float, float]:
    """The exact 95 % interval of a rate (Clopper and Pearson), by bisection of the binomial distribution."""

    def at_most(k: int, p: float) -> float:
        return sum(math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k + 1))

    def solve(holds: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    lower = 0.0 if alarms == 0 else solve(lambda p: 1 - at_most(alarms - 1, p) < 0.025)
    return lower, solve(lambda p: at_most(alarms, p) > 0.025)


def false_alarms(count: int, workers: int | None) -> None:
    """Print the rate of false alarms."""
    alarms = sum(tqdm(in_parallel(noisy_comparison, range(count), workers), total=count, disable=None))
    low, high = interval(alarms, count)
    print(f"{alarms} alarms in {count} comparisons: {alarms / count:.2%}, 95 % interval {low:.2%} to {high:.2%}; "
          f"stated: at most {LEVEL:.2%}")  # fmt: skip


def against_all(ids: list[str], workers: int | None) -> Iterator[tuple[str, str, Comparison | None, float]]:
    """Compare pipelines with the healthy one, under each plan."""
    tasks = [(id, name) for id in ids for name in PLANS]
    yield from tqdm(in_parallel(against_healthy, tasks, workers), total=len(tasks), disable=None)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rounding", "false-alarms", "faults", "limits"))
    parser.add_argument("--comparisons", type=int, default=400)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    if options.what == "false-alarms":
        return false_alarms(options.comparisons, options.workers)
    ids = {"rounding": list(all_variations()), "faults": list(all_faults()),
           "limits": [*LIMITS, "one row in eight dropped"]}[options.what]  # fmt: skip
    noticed, changed = dict[str, bool](), set[str]()
    for id, name, found, largest in against_all(ids, options.workers):
        if found is None:
            continue
        changed.add(id)
        noticed[id] = noticed.get(id, False) or found.is_alarm
        print(f"{id} ({name}): {found.outcome}, largest mean difference {largest:.2g}; {found.text}", flush=True)
    print(f"{len(changed)} of {len(ids)} change any figure; noticed: {sum(noticed.values())}")
    print("not noticed: " + (", ".join(id for id, is_noticed in noticed.items() if not is_noticed) or "none"))
    return None


if __name__ == "__main__":
    main()
