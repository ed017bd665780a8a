"""Claims about the optimizer: AdamW with the plan's settings updates every trained matrix, in sufficient precision."""

from __future__ import annotations

from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import CheckFailed
from glm4ft.testing.trial.trial import Trial

NEEDS = ("build_model", "train")


@check(
    stage="update", needs=NEEDS, incident="accelerate 2665, open-rl 80: parameters not in the optimizer; OpenRLHF 1253"
)
def check_update_follows_adamw(trial: Trial) -> None:
    """Each update of every trained matrix is AdamW's, with the plan's betas, epsilon and decoupled weight decay."""
    trial.require_plans("update_follows_adamw", "update")


@check(stage="update", needs=NEEDS, incident="torchdistx 52, verl-omni 73, keras 22559: small steps vanished")
def check_small_updates_are_not_lost(trial: Trial) -> None:
    """At a learning rate of 1e-6, the parameters still move by the closed form of AdamW."""
    trial.require_plans("small_updates_are_not_lost", "update")


@check(stage="update", needs=NEEDS, incident="adapters 260, accelerate 3256: built before the adapters were attached")
def check_optimizer_holds_every_trained_parameter(trial: Trial) -> None:
    """Each trained parameter is in exactly one parameter group of the optimizer."""
    trace = trial.run().trace
    names = [name for group in trace.steps[0].groups for name in group.names] if trace.steps else []
    if not names:
        raise CheckFailed(
            "no optimizer step updated a trained parameter: the optimizer holds other parameters, or none"
        )
    missing, twice = sorted(set(trace.trained) - set(names)), sorted({n for n in names if names.count(n) > 1})
    if missing:
        raise CheckFailed(f"{len(missing)} of {len(trace.trained)} trained parameters are in no group, as {missing[0]}")
    if twice:
        raise CheckFailed(f"{len(twice)} parameters are in more than one group, as {twice[0]}")
