"""What the comparison with a baseline notices, and how often it is wrong: the figures in docs/baselines.md.

Run: python tests/sweeps/baselines.py {rounding,false-alarms,faults,limits} [--results FILE] [--workers 2]
     python tests/sweeps/baselines.py page [--results FILE]

rounding: the largest mean difference of healthy pipelines that only round otherwise, and of the recorded curves on
    other instructions of the processor; the smallest effects that matter stand on it.
false-alarms: comparisons of pipelines that differ in noise alone, each with fresh seeds.
faults: which faults of the catalogue change the optimisation, and which of those the comparison alone notices.
limits: small changes of the optimisation, and which of them are noticed.
page: writes the figures into docs/baselines.md.

Each result is a line of FILE; what is there already is not measured again, so a sweep that was stopped goes on.

A pipeline changes the optimisation if the trained parameters at the end of a run differ from those of the healthy one:
their distance, as a share of the healthy run's way from its start, is larger than that of any pipeline that only rounds
otherwise, or they are other parameters. Neither losses nor norms, nor any verdict, take part in that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from baseline_page import write_figures
from tqdm import tqdm

from glm4ft.testing.baseline.compare import compare, compare_curves
from glm4ft.testing.baseline.curves import Curve, StepFigures
from glm4ft.testing.baseline.environment import Tier
from glm4ft.testing.baseline.measure import PACKED, PLAN, SEEDS, Measured, measure_trial
from glm4ft.testing.faults.registry import all_faults
from glm4ft.testing.faults.variations import all_variations
from glm4ft.testing.faults.warm import in_parallel, warm_base
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects import plain_loop, reasoning_loop
from glm4ft.testing.trial.conversations import all_conversations
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.trial import Trial

ROOT = Path(__file__).parents[2]
PLANS = {"padded": PLAN, "packed": PACKED}
NOISE = 0.05  # relative, of the initial adapters: large beside rounding and beside the smallest effect that matters
NOISY_STEPS = 4
FIRST_SEEDS = (1, 2)  # decide most faults; the test of the curves needs all
FAR = 0.01  # a distance of parameters that no rounding reaches
LIMITS: dict[str, dict[str, Any]] = {
    "rate 2 % higher": {"learning_rate": 5.1e-3},
    "rate 0.2 % higher": {"learning_rate": 5.01e-3},
    "weight decay 0 for 0.01": {"weight_decay": 0.0},
    "weight decay 0.1 for 0.01": {"weight_decay": 0.1},
    "first beta 0.91 for 0.9": {"betas": (0.91, 0.999)},
    "first beta 0.901 for 0.9": {"betas": (0.901, 0.999)},
    "second beta 0.99 for 0.999": {"betas": (0.9, 0.99)},
    "second beta 0.998 for 0.999": {"betas": (0.9, 0.998)},
    "epsilon 1e-6 for 1e-8": {"eps": 1e-6},
    "epsilon 1e-7 for 1e-8": {"eps": 1e-7},
    "epsilon 2e-8 for 1e-8": {"eps": 2e-8},
    "clipped to 0.99 for 1": {"max_grad_norm": 0.99},
}
# Settings of a process that make the libraries choose other kernels, as another processor would.
INSTRUCTIONS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "no vector instructions": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE",
                               "ONEDNN_MAX_CPU_ISA": "SSE41"},
}  # fmt: skip
PARTS = {"updates 2 % larger, the rate as it was": "LargerUpdates", "one row in eight dropped": "OneRowLess"}
HEALTHY = {kind.name: kind for kind in (reasoning_loop.Subject47, reasoning_loop.Subject, plain_loop.Subject)}
Result = dict[str, Any]


class OtherPlan(plain_loop.Subject):
    """A pipeline that trains by another plan than it was given."""

    changes: dict[str, Any] = {}  # noqa: RUF012  # set on each object

    def train(self, model: Any, conversations: Any, plan: Any) -> Any:
        """Train by the changed plan."""
        return super().train(model, conversations, {**plan, **self.changes})


class LargerUpdates(plain_loop.Subject):
    """A pipeline whose updates are 2 % larger than its optimizer says."""

    def update(self, run: plain_loop.LoopState) -> None:
        """Take the optimizer step, and 2 % of it once more."""
        trained = plain_loop.trained(run.model)
        before = [parameter.detach().clone() for parameter in trained]
        super().update(run)
        with torch.no_grad():
            for parameter, old in zip(trained, before, strict=True):
                parameter += 0.02 * (parameter - old)


class OneRowLess(plain_loop.Subject):
    """A pipeline that trains on another row in place of each eighth."""

    def items(self, rows: Any, packing: bool) -> Any:
        """The rows, or packs of them, with the first row in place of each eighth."""
        return super().items([rows[0] if i % 8 == 7 else row for i, row in enumerate(rows)], packing)


class KeepingTrial(Trial):
    """A trial that keeps the parameters with which each run began and ended."""

    def run_anew(self, of: str = "short", *, dropout: float = 0.0, **changes: Any) -> RecordedRun:
        """Record a whole run."""
        run = super().run_anew(of, dropout=dropout, **changes)
        self.shared.setdefault("ways", []).append((run.at(0), run.trained) if run.trace.steps else ({}, {}))
        run.model = None
        return run


def measured(
    kind: Callable[[str], Any], architecture: Any, plan: str, seeds: Sequence[int] = range(SEEDS)
) -> tuple[Measured, list[Any]]:
    """The curves of a pipeline, and for each seed the parameters with which it began and ended."""
    base = warm_base(architecture=architecture)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        trial = KeepingTrial(kind(str(base)), base, Path(folder), "sweep:Subject")
        found = measure_trial(trial, "tiny", plan=PLANS[plan], seeds=seeds)
    # without a commit: the rule for two runs of one commit is that every bit is equal
    return replace(found, baseline=replace(found.baseline, commit="")), trial.shared["ways"]


@cache
def healthy(name: str, architecture: Any, plan: str) -> tuple[Measured, list[Any]]:
    """The same of a healthy pipeline, measured once in each process."""
    return measured(HEALTHY[name], architecture, plan)


def pipeline(id: str) -> Callable[[str], Any]:
    """The pipeline of a fault, a variation or a change of the plan."""
    if id in LIMITS:
        return type("Changed", (OtherPlan,), {"changes": LIMITS[id]})
    known: dict[str, Any] = {**all_faults(), **all_variations()}
    return globals()[PARTS[id]] if id in PARTS else known[id].subject


def against_healthy(task: tuple[str, str]) -> Result:
    """Compare one pipeline with the healthy one that it derives from.

    Args:
        task: The sweep, and the id of a fault, a variation or a limit.
    Returns:
        The result under each plan; of a fault that was noticed under one, the others are left out.
    """
    group, id = task
    kind = pipeline(id)
    parent = next(parent for parent in kind.__mro__ if parent in HEALTHY.values())
    runs = list[Result]()
    for plan in PLANS:
        right = healthy(parent.__dict__["name"], kind.architecture, plan)
        try:
            found = compared(kind, plan, right, FIRST_SEEDS) or compared(kind, plan, right, range(SEEDS))
        except NotImplementedError:
            continue
        except Exception as error:  # a pipeline that stops is noticed
            found = {"outcome": "stopped", "is_alarm": True, "text": f"{type(error).__name__}: {error}"}
        runs.append({"plan": plan, **found})
        if group == "faults" and runs[-1]["is_alarm"] and runs[-1].get("distance", math.inf) > FAR:
            break
    return {"sweep": group, "id": id, "runs": runs}


def compared(kind: Any, plan: str, right: tuple[Measured, list[Any]], seeds: Sequence[int]) -> Result:
    """Compare some seeds of a pipeline with those of a healthy one.

    Returns:
        The result; empty if the seeds are too few to decide. They suffice where identity, a whole number or a rate
        differs, or nothing does.
    """
    now, other_ways = measured(kind, kind.architecture, plan, seeds)
    before, ways = right[0].baseline, [right[1][seed] for seed in seeds]
    before = replace(before, curves=tuple(before.curves[seed] for seed in seeds))
    try:
        found = compare(before, now)
    except ValueError:  # the test of the curves takes more seeds
        return {}
    return {**found.record(), "distance": _largest(map(distance, ways, other_ways))}


def distance(way: Any, other: Any) -> float:
    """How far two runs' parameters are apart at the end, as a share of the first run's way; infinite for others."""
    (start, end), (_, found) = way, other
    if {name: t.shape for name, t in end.items()} != {name: t.shape for name, t in found.items()}:
        return math.inf
    apart, walked = (
        math.sqrt(sum(float((a[name].double() - end[name].double()).pow(2).sum()) for name in end))
        for a in (found, start)
    )
    return apart / walked if math.isfinite(apart) else math.inf


def _largest(sizes: Iterable[float]) -> float:
    return max(sizes, default=math.inf)


def on_other_instructions(name: str) -> Result:
    """Compare the recorded curves of the dense base with those of a process that uses other instructions."""
    files = sorted((ROOT / "tests" / "baselines").glob("glm-4-0414-*.jsonl"))
    command = [sys.executable, "-m", "glm4ft", "baseline", "compare", *map(str, files), "--json"]
    text = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **INSTRUCTIONS[name]}).stdout
    runs = [{**found, "plan": Path(found["file"]).stem} for found in json.loads(text)["comparisons"]]
    return {"sweep": "instructions", "id": name, "runs": runs}


def noisy_comparison(number: int) -> Result:
    """Compare two sets of runs that differ in noise alone, with fresh seeds."""
    subject, plan = plain_loop.Subject(str(warm_base())), make_plan(**{**PLAN, "steps": NOISY_STEPS})
    before, now = (tuple(_noisy(subject, plan, number * SEEDS + s, side) for s in range(SEEDS)) for side in (0, 1))
    found = compare_curves(before, now, Tier.SAME_LIBRARIES)
    return {"sweep": "false-alarms", "id": str(number), "is_alarm": found.is_alarm, "p": found.p}


def _noisy(subject: plain_loop.Subject, plan: dict[str, Any], seed: int, side: int) -> Curve:
    """A run whose initial adapters have noise of its own; its figures are those of the healthy loop's log."""
    model = subject.build_model(str(warm_base()), seed)
    noise = torch.Generator().manual_seed(2 * seed + side + 1_000_000)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += NOISE * parameter.abs().mean() * torch.randn(parameter.shape, generator=noise)
    log = subject.train(model, all_conversations()["short"], {**plan, "seed": seed})
    return Curve(seed, tuple(StepFigures(e["step"], e["loss"], e["grad_norm"], e["learning_rate"], 0, 0) for e in log))


def results(work: Callable[[Any], Result], tasks: dict[str, Any], sweep: str, file: Path, workers: int) -> None:
    """Measure what is not in the file yet, and add it to the file."""
    known = {found["id"] for found in read_results(file) if found["sweep"] == sweep}
    left = [task for id, task in tasks.items() if id not in known]
    for found in tqdm(in_parallel(work, left, workers), total=len(left), disable=None) if left else ():
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found, ensure_ascii=False) + "\n")


def read_results(file: Path) -> list[Result]:
    """The results that a file holds."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def _sweeps(what: str, count: int) -> Iterator[tuple[str, Callable[[Any], Result], dict[str, Any]]]:
    ids = {"rounding": list(all_variations()), "faults": list(all_faults()), "limits": [*LIMITS, *PARTS]}
    if what == "false-alarms":
        yield what, noisy_comparison, {str(number): number for number in range(count)}
        return
    yield what, against_healthy, {id: (what, id) for id in ids[what]}
    if what == "rounding":
        yield "instructions", on_other_instructions, {name: name for name in INSTRUCTIONS}


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rounding", "false-alarms", "faults", "limits", "page"))
    parser.add_argument("--results", type=Path, default=Path("baselines-results.jsonl"))
    parser.add_argument("--comparisons", type=int, default=400)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.what == "page":
        return write_figures(ROOT / "docs" / "baselines.md", read_results(options.results))
    for sweep, work, tasks in _sweeps(options.what, options.comparisons):
        results(work, tasks, sweep, options.results, options.workers)
    return None


if __name__ == "__main__":
    main()
