"""Faults of the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import Subject, world_size

ESCAPES = "Schedules that a plan cannot express (restarts, a floor above zero that was asked for) are not compared."

fault = faults_at("schedule")


@fault(
    "sched-steps-times-world",
    processes=2,
    evidence="transformers 24088, 23986; diffusers 3954",
    cause=r"process|times|fast",
)
class SchedStepsTimesWorld(Subject):
    """The schedule advances one step per process in each optimizer step."""

    def rate_factor(self, step: int, plan: Mapping[str, Any]) -> float:
        return super().rate_factor(min(step * world_size(), plan["steps"]), plan)


@fault("sched-horizon-wrong", evidence="diffusers 4387, 2632; accelerate 1160", cause=r"horizon|micro-batch|stretched")
class SchedHorizonWrong(Subject):
    """The schedule is stretched over the number of micro-batches, so the learning rate decays too slowly."""

    def horizon(self, plan: Mapping[str, Any]) -> int:
        return super().horizon(plan) * int(plan["accumulation"])


@fault("warmup-skipped", evidence="axolotl 2535; PEFT 2950", cause=r"warm")
class WarmupSkipped(Subject):
    """The warm-up is a fraction of the steps and truncated to an integer too early, so there is no warm-up."""

    def rate_factor(self, step: int, plan: Mapping[str, Any]) -> float:
        return super().rate_factor(step, {**plan, "warmup_steps": int(plan["warmup_steps"] / plan["steps"])})


@fault("sched-kwargs-dropped", evidence="axolotl 972; LLaMA-Factory 7304", cause=r"linear|shape|kind")
class SchedKwargsDropped(Subject):
    """The options of the schedule are lost, so it has the default shape."""

    def rate_factor(self, step: int, plan: Mapping[str, Any]) -> float:
        return super().rate_factor(step, {**plan, "schedule": "linear"})


@fault("rate-a-step-behind", evidence=MADE_UP, cause=r"\bbehind\b|\blate\b|lags|step before|previous step")
class RateAStepBehind(Subject):
    """Each update uses the learning rate of the step before."""

    def rate_factor(self, step: int, plan: Mapping[str, Any]) -> float:
        return super().rate_factor(max(0, step - 1), plan)


@fault("decay-outlasts-the-run", evidence=MADE_UP, cause=r"the decay ends after 8 steps, not 6")
class DecayOutlastsTheRun(Subject):
    """The steps of the warm-up are added to those of the decay, which does not end with the run."""

    def horizon(self, plan: Mapping[str, Any]) -> int:
        return int(plan["steps"] + plan["warmup_steps"])


@fault("decay-ends-above-zero", evidence=MADE_UP, cause=r"ends at 0\.1 times the peak")
class DecayEndsAboveZero(Subject):
    """A cosine ends at a tenth of the peak, as it does in pretraining, though nobody asked for it."""

    def rate_factor(self, step: int, plan: Mapping[str, Any]) -> float:
        factor = super().rate_factor(step, plan)
        is_cosine = plan["schedule"] == "cosine" and step >= plan["warmup_steps"]
        return 0.1 + 0.9 * factor if is_cosine else factor
