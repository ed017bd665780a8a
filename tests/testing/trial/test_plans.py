"""Every stage of every plan has an owner that fails for it, and the plans combine every two settings.

Run: pytest tests/testing/trial/test_plans.py
"""

from __future__ import annotations

import contextlib
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.checks import all_checks
from glm4ft.testing.checks.model import EVALUATED
from glm4ft.testing.replay.departure import Departure
from glm4ft.testing.replay.replay import Verdict
from glm4ft.testing.subject import PLAN
from glm4ft.testing.trial.plans import COMBINED, NAMED, PLANS, STAGE_OWNERS, Plan
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

CHECKS = {check.name: check for check in all_checks()}


def trial_with(verdict: Verdict, *departing: Plan | None) -> Trial:
    """A trial whose runs agree with the specification, except for those of some plans."""
    trial = Trial(SimpleNamespace(), Path(), Path())
    good = Verdict(packed=True)

    def run_plan(plan: Plan) -> Any:
        return SimpleNamespace(
            verdict=verdict if plan in departing else good, order=[], rows=[], plan={"packing": True}, evaluated=[]
        )

    trial.run_plan = run_plan  # type: ignore[method-assign]
    return trial


@pytest.mark.parametrize("stage", STAGE_OWNERS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_departure_fails_in_the_check_that_owns_its_stage(plan: Plan, stage: str) -> None:
    """Or a plan that departs would only be skipped by checks of later stages, as dead adapters once were."""
    owner = CHECKS[plan.owner(stage)]
    assert owner.stage == stage
    trial = trial_with(Verdict({stage: Departure(stage, 1, "it is wrong")}), plan, plan.uninterrupted())
    with pytest.raises(CheckFailed) as caught:
        owner.run(trial)
    assert f"{stage}, step 1: it is wrong (plan {plan})" in str(caught.value)


def test_wrong_model_fails_though_the_subject_never_evaluates() -> None:
    """What an evaluation would show beside it is not needed, and a refusal may not turn the failure into a skip."""
    trial = trial_with(Verdict({"model": Departure("model", 1, "it is wrong")}), PLANS[0])
    run = trial.run_plan

    def refuse(plan: Plan) -> Any:
        if plan.changes.get("eval_every"):
            raise NotImplementedError("it never evaluates")
        return run(plan)

    trial.run_plan = refuse  # type: ignore[method-assign]
    with pytest.raises(CheckFailed, match="it is wrong"):
        CHECKS["model_computes_what_was_requested"].run(trial)


@pytest.mark.parametrize("is_evaluated_run_wrong", [True, False])
def test_only_a_run_that_is_wrong_in_training_and_right_in_evaluation_shows_the_difference(
    is_evaluated_run_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Verdict({"model": Departure("model", 1, "it is wrong")})
    trial = trial_with(wrong, PLANS[1], *([EVALUATED, EVALUATED.uninterrupted()] if is_evaluated_run_wrong else []))
    run = trial.run_plan
    right = [SimpleNamespace(span=SimpleNamespace(start=0), size=0.0)]
    trial.run_plan = lambda plan: SimpleNamespace(**{**vars(run(plan)), "evaluated": right})  # type: ignore[method-assign]
    monkeypatch.setattr(Trial, "dtype", torch.float32)
    with pytest.raises(CheckFailed) as caught:
        CHECKS["model_computes_what_was_requested"].run(trial)
    assert ("in training alone" in caught.value.cause) == is_evaluated_run_wrong


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.uninterrupted()], ids=str)
def test_departure_with_evaluations_or_saves_alone_is_a_side_effect_of_theirs(plan: Plan) -> None:
    trial = trial_with(Verdict({"gradient": Departure("gradient", 3, "it is lost")}), plan)
    with contextlib.suppress(NotApplicable):  # where it is the check's only plan
        CHECKS[plan.owner("gradient")].run(trial)
    with pytest.raises(CheckFailed, match="evaluating or saving changes the run: gradient, step 3: it is lost"):
        CHECKS["evaluating_and_saving_change_no_other_plan"].run(trial)


def test_stage_that_a_departure_hides_is_not_said_to_hold() -> None:
    hidden = Verdict({"rows": Departure("rows", 1, "cut")}, hidden={"update": "rows"})
    (plan,) = [plan for plan in PLANS if plan.owner("update") == "small_updates_are_not_lost"]
    with pytest.raises(NotApplicable, match="a departure at rows hides it"):
        trial_with(hidden, plan).require_plans("small_updates_are_not_lost", "update")


def test_one_cause_under_many_plans_is_told_once() -> None:
    trial = trial_with(Verdict(), PLANS[0])
    wrong = Verdict({"update": Departure("update", 1, "off", "betas are (0.8, 0.99)")})
    trial.run_plan = lambda plan: SimpleNamespace(verdict=wrong)  # type: ignore[method-assign,assignment]
    with pytest.raises(CheckFailed) as caught:
        trial.require_plans("update_follows_adamw", "update")
    assert str(caught.value).count("betas are") == 1


def test_plans_have_names_of_their_own_and_known_settings() -> None:
    assert len({plan.name for plan in NAMED}) == len(NAMED)
    assert {key for plan in PLANS for key in plan.changes} <= set(PLAN)


def test_every_pair_of_settings_is_combined() -> None:
    plans = [{**PLAN, **plan.changes} for plan in COMBINED]
    names = [name for name in COMBINED[0].changes if name != "steps"]
    levels = {name: {plan[name] for plan in plans} for name in names}
    assert all(len(values) >= 2 for values in levels.values())
    missing = [
        (one, a, other, b)
        for one, other in combinations(names, 2)
        for a, b in product(levels[one], levels[other])
        if not any((plan[one], plan[other]) == (a, b) for plan in plans)
    ]
    assert missing == []


def test_one_plan_trains_a_row_longer_than_common_chunks_and_windows(healthy: Trial) -> None:
    """Its targets too: chunked losses cut what is supervised at 1,024 tokens, kernels the row at 2,048."""
    assert any(plan.of == "long" for plan in NAMED)
    ids, labels = healthy.rows(healthy.data["long"])[0]
    assert len(ids) > 2048
    assert sum(label != IGNORED for label in labels) > 1024
