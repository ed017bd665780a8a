"""Claims about the learning rate: it follows the requested closed form to the end of the run."""

from __future__ import annotations

from glm4ft.testing.trial.processes import require_ranks_stage
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import CheckFailed
from glm4ft.testing.trial.trial import Trial

NEEDS = ("build_model", "train")


@check(
    stage="schedule", needs=NEEDS, incident="axolotl 2535: no warm-up; axolotl 972, LLaMA-Factory 7304: another shape"
)
def check_learning_rate_follows_the_schedule(trial: Trial) -> None:
    """The learning rate warms up, from zero or above it, and then follows the requested shape to the end of the run."""
    trial.require_plans("learning_rate_follows_the_schedule", "schedule")


@check(stage="schedule", needs=NEEDS, incident="diffusers 4387 and 2632, accelerate 1160: micro-batches as the horizon")
def check_schedule_horizon_counts_optimizer_steps(trial: Trial) -> None:
    """With accumulation, the schedule still ends with the last optimizer step."""
    trial.require_plans("schedule_horizon_counts_optimizer_steps", "schedule")


@check(stage="schedule", needs=(*NEEDS, "distributed"), incident="transformers 24088 and 23986, diffusers 3954")
def check_schedule_is_the_same_on_several_processes(trial: Trial) -> None:
    """Two processes have the same learning rates as one process."""
    require_ranks_stage(trial, "schedule")


@check(stage="schedule", needs=NEEDS, incident="a log that shows the next step's rate hides a missing warm-up")
def check_logged_learning_rate_is_the_one_applied(trial: Trial) -> None:
    """The learning rate logged for a step is the one that its update used."""
    run = trial.run(schedule="linear", warmup_steps=2, steps=6)
    for number, got in run.logged("learning_rate").items():
        if number <= len(run.trace.steps):
            rate = float(run.trace.steps[number - 1].groups[0].settings["lr"])
            if not abs(got - rate) <= 1e-6 * run.plan["learning_rate"]:
                raise CheckFailed(f"step {number}: the log says a rate of {got:.6g}, the update used {rate:.6g}")
