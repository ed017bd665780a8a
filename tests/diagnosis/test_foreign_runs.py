"""A log that another trainer left is read, and the cause that made it is named first; a healthy one raises no alarm.

Run: pytest tests/diagnosis/test_foreign_runs.py

Each case is a mechanism that was reported somewhere, put into a curve with the noise of real batches, and written in
the format of one trainer. What a case asks for is the verdict and the figures that its user needs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from foreign_runs import NAN, WRITERS, Run, changed, healthy, write

from glm4ft.diagnosis.run_folder import explain_run
from glm4ft.report.plain_words import NOTHING_WRONG

Point = dict[str, float]
Fault = Callable[[Run], Run]


def each(**figures: float) -> Fault:
    """The same figures at every logged step."""
    return lambda run: changed(run, lambda i, point: figures)


def since(at: int, *, up: float = 0.0, norm: float = 1.0, **figures: float) -> Fault:
    """From a point on, a loss that is higher by ``up``, a norm ``norm`` times as large, and fixed figures."""

    def change(i: int, point: Point) -> Mapping[str, float]:
        moved = {"loss": point["loss"] + up, "grad_norm": norm * point["grad_norm"]}
        return {**moved, **figures} if i >= at else {}

    return lambda run: changed(run, change)


def now_and_then(**figures: float) -> Fault:
    return lambda run: changed(run, lambda i, point: figures if i % 7 == 3 else {})


def overflowing() -> Fault:
    """The first loss is that of the base, its gradient is not finite, and the update breaks the weights."""
    return lambda run: changed(run, lambda i, point: {"loss": point["loss"] if i == 0 else 0.0, "grad_norm": NAN})


def broken_twice() -> Fault:
    """The first update is skipped, as an fp16 run finds its loss scale; much later the run breaks."""
    figures = {"loss": 0.0, "grad_norm": NAN}
    return lambda run: changed(run, lambda i, point: {"grad_norm": NAN} if i == 0 else figures if i >= 40 else {})


def flat(value: float, scatter: float, **figures: float) -> Fault:
    """Batches differ, but nothing is learnt."""
    draw = random.Random(7)
    return lambda run: changed(run, lambda i, point: {"loss": value * math.exp(draw.gauss(0, scatter)), **figures})


def times(factor: float) -> Fault:
    """Training losses and norms as many times as large; evaluations as they are."""
    return lambda run: changed(
        run, lambda i, point: {"loss": factor * point["loss"], "grad_norm": factor * point["grad_norm"]}
    )


def diverging(*, at: int, to: float, over: int) -> Fault:
    draw = random.Random(3)

    def change(i: int, point: Point) -> Mapping[str, float]:
        if i < at:
            return {}
        share = min(1.0, (i - at) / over)
        loss = point["loss"] + share * (to - point["loss"]) * math.exp(draw.gauss(0, 0.08))
        return {
            "loss": loss,
            "grad_norm": (6 if share < 1 else 1.5) * point["grad_norm"] * math.exp(draw.gauss(0, 0.5)),
        }

    return lambda run: changed(run, change)


def spiking(*, number: int, height: float) -> Fault:
    def make(run: Run) -> Run:
        draw = random.Random(5)
        hit = set(draw.sample(range(10, len(run.points)), number))
        return changed(run, lambda i, point: {"loss": height + draw.random(), "grad_norm": 30.0} if i in hit else {})

    return lambda run: make(flat(1.9, 0.05)(run))


def repeating(period: int) -> Fault:
    """Every epoch shows the same losses in the same order: nothing was learnt in between (BeyonderXX/TRACE 5)."""
    return lambda run: changed(run, lambda i, point: {"loss": round(1 + 0.4 * math.sin(3.1 * (i % period)), 4)})


def evaluated(*losses: float) -> Fault:
    def make(run: Run) -> Run:
        last = int(run.points[-1]["step"])
        steps = [round(last * (i + 1) / len(losses)) for i in range(len(losses))]
        return replace(run, evaluations=tuple(zip(steps, losses, strict=True)))

    return make


def started_over(at: int, *, scatter: float) -> Fault:
    """The weights of the checkpoint are not loaded (transformers 33336): the curve begins anew, the rate goes on."""

    def make(run: Run) -> Run:
        draw = random.Random(11)
        return changed(
            run,
            lambda i, point: (
                {
                    "loss": run.points[i - at]["loss"] * math.exp(draw.gauss(0, scatter)),
                    "grad_norm": run.points[i - at]["grad_norm"],
                }
                if i >= at
                else {}
            ),
        )

    return make


def without_moments(at: int) -> Fault:
    """The optimizer and its rate begin anew: a bump that comes down again."""

    def change(i: int, point: Point) -> Mapping[str, float]:
        bump = 0.35 * math.exp(-(i - at) / 12)
        norm = point["grad_norm"] * (1 + 3 * bump)
        return {"loss": point["loss"] + bump, "grad_norm": norm, "lr": 1e-4} if i >= at else {}

    return lambda run: changed(run, change)


def ending_rate(at: int) -> Fault:
    return lambda run: changed(run, lambda i, point: {"lr": 1e-4 * max(0.0, 1 - i / at)})


def by_heart() -> Fault:
    return lambda run: changed(run, lambda i, point: {"loss": round(2 * math.exp(-i / 6), 4)})


@dataclass(frozen=True)
class Case:
    """A run with a fault.

    Args:
        id: The mechanism and the trainer whose format the log has.
        trainer: The trainer.
        fault: Puts the fault into a healthy run.
        verdict: The first finding.
        says: Words that the first finding has to have.
        healthy: Options of the healthy run.
        run: Fields of the run: options, checkpoints, planned steps.
    """

    id: str
    trainer: str
    fault: Fault
    verdict: str
    says: tuple[str, ...]
    healthy: Mapping[str, Any]
    run: Mapping[str, Any]


def case(name: str, fault: Fault, verdict: str, says: str = "", *, evaluate: int = 10_000, **more: Any) -> Case:
    """Write a case in few words: ``mechanism/trainer``, and the words to say, separated by bars."""
    fields = {key: more.pop(key) for key in ("options", "checkpoints", "planned") if key in more}
    words = tuple(filter(None, says.split(" | ")))
    options = {"evaluate": evaluate, **more}
    return Case(name, name.partition("/")[2], fault, verdict, words, options, fields)


SHORT = {"steps": 40, "every": 1, "pace": 3.0, "scatter": 0.02, "schedule": "constant"}
FIRST = "from the first logged step on"
CASES = (
    # numbers that are not finite, or hidden behind zeros (LLaMA-Factory 4031, 6286, 8004, 2916; alpaca-lora 391)
    case("overflow-in-backward/swift", overflowing(), "numerics", "weights were sound | fp16", every=1),
    case("nan-at-once/transformers", each(loss=NAN, grad_norm=NAN), "numerics", f"{FIRST} | never initialised",
         every=1),
    case("zeros-and-nan-norms/axolotl", each(loss=0.0, grad_norm=NAN), "numerics", f"{FIRST} | fp16"),
    case("nan-later/transformers", since(40, loss=0.0, grad_norm=NAN), "numerics", "from step 205 on"),
    case("nan-later/llamafactory", since(40, loss=0.0), "numerics", "from step 205 on | exactly 0"),
    case("after-a-skipped-update/axolotl", broken_twice(), "numerics", "from step 205 on"),
    case("updates-skipped/transformers", flat(1.8, 0.05, grad_norm=math.inf), "numerics", "every step | skipped"),
    case("some-nan/transformers", now_and_then(loss=NAN, grad_norm=NAN), "numerics", "finite again later | target"),
    case("no-labels/transformers", each(loss=0.0, grad_norm=0.0), "zero-loss", "exactly 0 | -100"),
    case("no-labels/llamafactory", each(loss=0.0), "zero-loss", "exactly 0 | -100"),
    case("zero-and-norm-one/swift", since(50, loss=0.0, grad_norm=1.0), "zero-loss",
         "first step with a loss of 0: 255"),
    case("some-without-labels/transformers", now_and_then(loss=0.0, grad_norm=0.0), "zero-loss", "of 80 logged steps"),
    # nothing moves
    case("frozen-adapter/transformers", flat(1.8, 0.06, grad_norm=0.0), "no-gradient", "from the first step on"),
    case("frozen-adapter/terminal", each(loss=2.3456, grad_norm=0.0), "no-gradient", "from the first step on | 2.3456"),
    case("gradient-vanishes/transformers", since(30, loss=1.31, grad_norm=0.0), "training-stopped", "at step 155"),
    case("frozen-at-a-save/lightning", since(30, loss=1.3125), "training-stopped", "From step 155 on"),
    case("no-rate/transformers", flat(1.8, 0.06, lr=0.0), "rate-zero", "learning rate is 0"),
    case("not-in-optimizer/torchtune", each(loss=1.8123), "updates-without-effect", "constant at 1.8123"),
    case("epochs-alike/transformers", repeating(8), "updates-without-effect", "repeat after every 8"),
    # the first loss (transformers 34263; LLaMA-Factory 7443)
    case("summed/transformers", times(16), "wrong-start", "accumulation"),
    case("summed/llamafactory", times(4), "loss-not-a-mean", "evaluations of the same run | accumulation",
         evaluate=100, scatter=0.02),
    case("summed/swift", times(8), "loss-not-a-mean", "the number of accumulation steps (8)", evaluate=40,
         options={"gradient_accumulation_steps": 8}),
    case("summed-ranks/swift", times(4), "loss-not-a-mean", "the world size (4)", evaluate=40,
         options={"global_world_size": 4}),
    case("random-weights/axolotl", times(6.2), "wrong-start", "pretrained"),
    # a resume (ms-swift 6049; LLaMA-Factory 512; transformers 33336)
    case("resume-other-data/transformers", since(60, up=0.5, norm=6.0), "resume-lost-state", "step 305 | norm",
         pace=0.3),
    case("resume-scaled/swift", since(60, up=0.4, norm=4.0), "resume-lost-state", "step 305 | checkpoint of step 300",
         checkpoints=(300,)),
    case("resume-weights/swift", started_over(50, scatter=0.02), "resume-lost-state", "step 255 | where the run began",
         end=0.8, checkpoints=(250,)),
    case("resume-all/transformers", started_over(50, scatter=0.0), "resume-lost-state", "step 255 | to the last digit"),
    case("resume-moments/transformers", without_moments(50), "resume-lost-state", "step 255 | optimizer",
         checkpoints=(250,)),
    case("resume-unseen-norms/llamafactory", since(60, up=0.5), "resume-lost-state", "step 305"),
    # evaluations (LLaMA-Factory 1450; Chinese-LLaMA-Alpaca-2 370)
    case("over-fitting/transformers", evaluated(1.4, 1.1, 1.2, 1.5, 1.9, 2.4), "over-fitting", "since step 133",
         end=0.05, pace=0.4),
    case("over-fitting/lightning", evaluated(1.5, 1.3, 1.28, 1.36, 1.47), "over-fitting", "since step 240", end=0.3),
    case("over-fitting/llamafactory", evaluated(0.95, 0.97, 1.2), "over-fitting", "since step 133", end=0.1, pace=0.5),
    case("over-fitting-kept/axolotl", evaluated(1.4, 1.1, 1.2, 1.6), "over-fitting",
         "take checkpoint-200, the best one",
         end=0.1, pace=0.5, checkpoints=(200,)),
    case("evaluation-nan/transformers", evaluated(NAN, NAN, NAN), "evaluation-not-finite", "NaN | target"),
    case("evaluation-of-the-base/axolotl", evaluated(1.9321, 1.9321, 1.9321), "evaluation-unmoved", "last digit"),
    case("evaluation-of-other-rows/transformers", evaluated(2.87, 2.88, 2.9, 2.9), "evaluation-apart",
         "stays at 2.9 | another kind", end=0.4),
    # the log itself (finetrainers 63; composer 1501)
    case("norms-taken-away/transformers", each(grad_norm=0.0), "norms-not-logged", "the loss falls | DeepSpeed"),
    case("preferences/transformers", since(0, up=-3.0), "negative-loss", "No cross entropy is below"),
    # the rate (LLaVA 1301, 1375)
    case("diverged/transformers", diverging(at=30, to=6.5, over=5), "rate-too-high", "learning rate", rate=1e-3),
    case("climbs/swift", diverging(at=20, to=3.0, over=40), "rate-too-high", "learning rate", rate=4e-4),
    case("learns-nothing/transformers", flat(7.4, 0.01), "rate-too-high", "learning rate", rate=1e-2),
    case("high-rate-constant/llamafactory", each(loss=7.3251), "rate-too-high", "7.3251 | too high", rate=0.05),
    case("collapsed-at-once/terminal", since(1, loss=7.6312), "rate-too-high", "7.6312 | too high", rate=0.01),
    case("spikes/transformers", spiking(number=9, height=5.0), "rate-too-high", "spikes", rate=5e-4),
    case("rate-too-low/transformers", flat(1.85, 0.03), "rate-too-low", "learning rate", rate=1e-7),
    case("schedule-ended/transformers", ending_rate(25), "schedule-ended-early", "by step"),
    # too few steps, or nothing to say
    case("few-steps/llamafactory", each(lr=1e-4), "still-falling", "train longer", **SHORT),
    case("killed/swift", each(lr=1e-4), "still-falling", "train longer | step 40 of 400", **SHORT, planned=400),
    case("nothing-learnt/transformers", flat(1.2, 0.06), "not-falling", "has not fallen"),
    case("too-noisy/transformers", flat(1.2, 0.4), "undecided", "noise", steps=60),
    case("by-heart/transformers", by_heart(), "memorised", "by heart"),
)  # fmt: skip


def _steps_down(i: int, point: Point) -> Mapping[str, float]:
    return {"loss": point["loss"] * (1, 0.8, 0.68)[min(2, int(point["epoch"]))]}


# What a curve may do without being a fault.
HEALTHY: Mapping[str, Run] = {
    "cosine": healthy(1),
    "noisy": healthy(2, every=1, scatter=0.3, evaluate=80),
    "long": healthy(3, steps=3000, every=10, evaluate=500),
    "few-batches": healthy(4, steps=120, every=1, scatter=0.15, evaluate=30),
    "well-known-answers": healthy(5, start=0.7, end=0.45),
    "large-rate": healthy(6, rate=1e-3),
    "all-weights": healthy(7, rate=1e-5, start=1.4, end=0.9),
    "rows-come-back": changed(healthy(8, scatter=0.02), _steps_down),
    "one-hard-batch": changed(healthy(9), lambda i, point: {"loss": 4.2, "grad_norm": 9.0} if i == 33 else {}),
    "resumed-well": replace(healthy(10), checkpoints=(200,)),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_first_cause_is_the_one_that_made_the_log(case: Case, tmp_path: Path) -> None:
    run = replace(case.fault(healthy(0, **case.healthy)), **case.run)
    first = explain_run(write(case.trainer, run, tmp_path)).findings[0]
    assert first.verdict == case.verdict, first.text
    assert first.verdict not in NOTHING_WRONG
    told = " ".join([first.text, *first.evidence, first.remedy])
    assert [word for word in case.says if word not in told] == []


@pytest.mark.parametrize("trainer", WRITERS)
@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_run_raises_no_alarm(kind: str, trainer: str, tmp_path: Path) -> None:
    diagnosis = explain_run(write(trainer, HEALTHY[kind], tmp_path))
    assert [finding.verdict for finding in diagnosis.findings] == ["trained"], diagnosis.text
