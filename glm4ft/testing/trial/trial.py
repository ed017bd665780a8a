"""The trial that every check receives: recorded runs of a subject, judged under the plans that the check owns."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from glm4ft.testing.replay.departure import Departure
from glm4ft.testing.trial.plans import PLANS, UNCLIPPED, Plan, plans_of
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.shared_runs import SharedRuns
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable

LOSS_LIMIT = 0.01  # the largest loss of two memorised conversations, in nats per supervised token


class Trial(SharedRuns):
    """One subject on one base, whose runs under many plans are judged, each plan by the checks that own it.

    It is made like ``SharedRuns``.
    """

    def asked(self, plans: Iterable[Plan]) -> list[Plan]:
        """Those of some plans that are run on this base."""
        return [plan for plan in plans if plan.name not in self.left_out]

    def run_plan(self, plan: Plan) -> RecordedRun:
        """Record the run of a plan, or return the recorded one.

        Raises:
            NotImplementedError: If the subject does not offer what the plan needs.
        """
        if plan.of != "short" and not all(self.accepts(conversation) for conversation in self.data[plan.of]):
            raise NotImplementedError(f"the subject refuses some of the conversations ({plan.of})")
        run = self.run(plan.of, **plan.changes)
        found = run.verdict.departures.get("gradient")
        if found and found.factor and plan.name != UNCLIPPED and self.removes_factor:
            run.judge_again(factor_is_removed=True)
        return run

    def departs_interrupted_only(self, plan: Plan, stage: str) -> bool:
        """Whether the run of a plan departs at a stage, and not without its evaluations and saves: a side effect."""
        bare = plan.uninterrupted()
        return bare is not None and stage not in self.run_plan(bare).verdict.departures

    def offered(self, plans: Iterable[Mapping[str, Any]], **common: Any) -> list[tuple[Mapping[str, Any], RecordedRun]]:
        """The runs of those plans that the subject offers, each with what its plan changes.

        Args:
            plans: The changes to the standard plan, for each run.
            common: Further changes, for all runs.
        Raises:
            NotImplementedError: If the subject offers none of them.
        """
        found, refusals = list[tuple[Mapping[str, Any], RecordedRun]](), list[NotImplementedError]()
        for changes in plans:
            try:
                found.append((changes, self.run(**{**common, **changes})))
            except NotImplementedError as refusal:
                refusals.append(refusal)
        if refusals and not found:
            raise refusals[0]
        return found

    def grad_norms(self, run: RecordedRun) -> list[float]:
        """The global gradient norm of each step of a run before clipping, without a factor that is taken out again."""
        if run.has_loss_factor and self.removes_factor:
            run.judge_again(factor_is_removed=True)
        return run.grad_norms()

    @functools.cached_property
    def removes_factor(self) -> bool:
        """Whether the pipeline multiplies its loss by a factor and the gradient by its inverse, as loss scaling does.

        Where clipping acts, a gradient that is too large cannot be told from one that is scaled; without it, it can.
        """
        plan = next(plan for plan in PLANS if plan.name == UNCLIPPED)
        try:
            verdict = self.run_plan(plan).verdict
            return verdict.removes_factor and not verdict.departures
        except NotImplementedError:
            return False

    def require_plans(self, check: str, stage: str) -> list[RecordedRun]:
        """Fail if the run of any plan that a check owns departs at its stage.

        Args:
            check: The name of the check.
            stage: The stage that it judges.
        Returns:
            The runs that were judged.
        Raises:
            CheckFailed: If a run departs at this stage; the message has each different departure once, with its plan.
            NotApplicable: If none of the plans could be judged.
        """
        departures, judged, reasons = dict[str, tuple[Departure, Plan]](), list[RecordedRun](), list[str]()
        for plan in self.asked(plans_of(check, stage)):
            try:
                run = self.run_plan(plan)
            except NotImplementedError as error:
                reasons.append(f"the subject does not offer this ({plan}): {error}")
                continue
            found = run.verdict.at(stage)
            if found and self.departs_interrupted_only(plan, stage):
                reasons.append(f"not judged: it departs as a side effect of evaluating or saving (plan {plan})")
                continue
            for departure in found:
                departures.setdefault(departure.kind, (departure, plan))
            if found:
                continue
            if stage in run.verdict.hidden:
                reasons.append(f"not judged: a departure at {run.verdict.hidden[stage]} hides it (plan {plan})")
            else:
                judged.append(run)
        if departures:
            lines = [f"{departure} (plan {plan})" for departure, plan in departures.values()]
            causes = (departure.cause for departure, _ in departures.values() if departure.cause)
            raise CheckFailed("\n".join(lines), cause=next(causes, ""))
        if not judged:
            raise NotApplicable(reasons[0])
        return judged
