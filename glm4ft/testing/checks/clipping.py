"""Claims about gradient clipping: all gradients are multiplied by one factor, computed from the global norm."""

from __future__ import annotations

from glm4ft.testing.replay.tolerances import within
from glm4ft.testing.trial.plans import SMALL_NORM
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import CheckFailed
from glm4ft.testing.trial.trial import Trial

NEEDS = ("build_model", "train")
# Relative; the norm is summed in fp32 by the trainer, in fp64 here. Measured below 1e-6 (x86-64 CPU, 2026-11-25).
NORM_LIMIT = 1e-4


@check(stage="clipping", needs=NEEDS, incident="DeepSpeed 5150: coefficient inverted; aprender 2112: no effect")
def check_gradient_is_clipped_to_its_global_norm(trial: Trial) -> None:
    """A gradient norm above the limit is scaled down to it, one below stays, and a limit of 0 switches clipping off."""
    trial.require_plans("gradient_is_clipped_to_its_global_norm", "clipping")


@check(
    stage="clipping", needs=NEEDS, incident="miles 2132: the logged norm was the clipped one, which hides every spike"
)
def check_logged_gradient_norm_is_the_one_before_clipping(trial: Trial) -> None:
    """The logged gradient norm is the global norm of the accumulated gradient, before clipping."""
    run = trial.run(max_grad_norm=SMALL_NORM, steps=4)
    logged = run.logged("grad_norm")
    for number, norm in enumerate(trial.grad_norms(run), start=1):
        if number in logged:
            got = logged[number]
            if not within("clipping: logged norm", abs(got / norm - 1), NORM_LIMIT):
                is_clipped = abs(got / SMALL_NORM - 1) <= NORM_LIMIT
                cause = "it is the one after clipping" if is_clipped else f"{got / norm:.4g} times as much"
                raise CheckFailed(f"step {number}: the log says a norm of {got:.6g}, it is {norm:.6g}: {cause}")
