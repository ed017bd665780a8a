"""Every check of a recorded run fails, and states the reason, for a recording in which its claim does not hold.

Run: pytest tests/testing/checks/test_checks_of_runs.py
Healthy runs of the plain loop are recorded once and then tampered with, so that each case costs at most a replay.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from glm4ft.testing.checks import all_checks
from glm4ft.testing.recording.trace import Step, Tensors
from glm4ft.testing.trial.processes import run_of_ranks
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.stages import CheckFailed
from glm4ft.testing.trial.trial import Trial

pytestmark = pytest.mark.usefixtures("named_plans_only")
CHECKS = {check.name: check for check in all_checks()}
Tamper = Callable[[RecordedRun], None]


@dataclass
class Tampered(Trial):
    """A trial that returns tampered recordings of a healthy trial."""

    healthy: Trial | None = None
    tamper: Tamper = lambda run: None
    only: dict[str, Any] = field(default_factory=dict)

    def run_anew(self, of: str = "short", **changes: Any) -> RecordedRun:
        """A healthy run, tampered with if its plan matches ``only``."""
        assert self.healthy is not None
        healthy = self.healthy.run(of, **{k: v for k, v in changes.items() if k != "resume_from"})
        if changes.get("resume_from"):
            healthy = _rest(healthy, int(str(changes["resume_from"]).rpartition("-")[2]))
        if any(changes.get(name) != value for name, value in self.only.items()):
            return healthy  # with the verdict that it may have already
        run = replace(healthy, trace=copy.deepcopy(healthy.trace), log=copy.deepcopy(healthy.log))
        self.tamper(run)
        return run


def _rest(run: RecordedRun, done: int) -> RecordedRun:
    """The recording without the first ``done`` steps, as of a resumed run."""
    return replace(run, trace=replace(run.trace, steps=run.trace.steps[done:]))


# --- what is done to a recording --------------------------------------------------------------------------------------


def every_step(change: Callable[[Step], None]) -> Tamper:
    def tamper(run: RecordedRun) -> None:
        for step in run.trace.steps:
            change(step)

    return tamper


def at_step(number: int, change: Callable[[Step], None]) -> Tamper:
    return lambda run: change(run.trace.steps[number - 1])


def scaled(name: str, factor: float) -> Callable[[Step], None]:
    return lambda step: setattr(step, name, {n: factor * t for n, t in getattr(step, name).items()})


def first_name(tensors: Tensors) -> str:
    return next(name for name in tensors if ".lora_A." in name)


def repeat_first_step(run: RecordedRun) -> None:
    run.trace.steps[1] = run.trace.steps[0]


def same_epochs(run: RecordedRun) -> None:
    run.trace.steps = run.trace.steps[:4] * 2


def reversed_steps(run: RecordedRun) -> None:
    run.trace.steps.reverse()


def lose_last_pack(run: RecordedRun) -> None:
    whole = run.rows_in(run.trace.steps[0].forwards)
    run.trace.steps = [step for step in run.trace.steps if run.rows_in(step.forwards) != whole][:2]


def noise_in_evaluation(run: RecordedRun) -> None:
    for _, forward in run.trace.evaluations:
        forward.hidden_BTD += 1e-3


def noise_behind_padding(run: RecordedRun) -> None:
    for _, forward in run.trace.evaluations:
        assert forward.attention_mask is not None
        forward.input_ids_BT, forward.attention_mask = (
            pad(t, (3, 0)) for t in (forward.input_ids_BT, forward.attention_mask)
        )
        forward.hidden_BTD = pad(forward.hidden_BTD, (0, 0, 3, 0)) + 1e-3


def evaluated_on_the_base(run: RecordedRun) -> None:
    with torch.no_grad():
        for _, forward in run.trace.evaluations:
            for span in run.known.find_in(forward).rows:
                forward.hidden_BTD[span.b][span.positions] = run.reference.hidden(span.ids, {})


def moved_b(step: Step) -> None:
    name = next(name for name in step.before if ".lora_B." in name)
    step.before[name] = step.before[name] + 1e-3


def gradient_at_masked_position(step: Step) -> None:
    gradient_BTD = step.forwards[0].gradient_BTD
    assert gradient_BTD is not None
    gradient_BTD[0, 0, 0] = 1e-12


def not_a_number(step: Step) -> None:
    gradient_BTD = step.forwards[0].gradient_BTD
    assert gradient_BTD is not None
    gradient_BTD[0, 5, 0] = float("nan")


def other_rows(step: Step) -> None:
    for forward in step.forwards:
        forward.input_ids_BT = torch.full_like(forward.input_ids_BT, 7)


def coarse(step: Step) -> None:
    step.after = {n: t.bfloat16() for n, t in step.after.items()}


def coarse_moments(step: Step) -> None:
    step.state_dtypes = dict.fromkeys(step.state_dtypes, torch.bfloat16)


def unmoved(run: RecordedRun) -> None:
    name = first_name(run.trace.steps[0].before)
    run.trace.steps[-1].after[name] = run.trace.steps[0].before[name]


def logged(name: str, change: Callable[[float], float]) -> Tamper:
    def tamper(run: RecordedRun) -> None:
        for entry in run.log:
            entry[name] = change(entry[name])  # type: ignore[index]

    return tamper


def clipped_by(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Step], None]:
    return lambda step: setattr(step, "clipped", {n: change(n, t) for n, t in step.raw.items()})


def clipped_to(limit: float) -> Callable[[Step], None]:
    def change(step: Step) -> None:
        norm = sum(float(t.pow(2).sum()) for t in step.raw.values()) ** 0.5
        step.clipped = {name: t * limit / norm for name, t in step.raw.items()}

    return change


def without_forward(step: Step) -> None:
    step.forwards = []


def twice_the_first_token(run: RecordedRun) -> None:
    """The gradient at the final norm of the first trained token of each row is doubled."""
    for forward in run.trace.steps[0].forwards:
        assert forward.gradient_BTD is not None
        for gradient_TD in forward.gradient_BTD:
            gradient_TD[int(gradient_TD.norm(dim=1).nonzero()[0])] *= 2


def rate(change: Callable[[int, float], float]) -> Tamper:
    def tamper(run: RecordedRun) -> None:
        for number, step in enumerate(run.trace.steps):
            for group in step.groups:
                group.settings["lr"] = change(number, group.settings["lr"])

    return tamper


def without_first_in_groups(run: RecordedRun) -> None:
    for step in run.trace.steps:
        step.groups = [replace(g, names=g.names[1:]) for g in step.groups]


def in_two_groups(run: RecordedRun) -> None:
    for step in run.trace.steps:
        step.groups = [*step.groups, *step.groups]


def empty_group(step: Step) -> None:
    step.groups = [*step.groups, replace(step.groups[0], names=(), size=0, settings={"lr": 1.0})]


def changed_base(run: RecordedRun) -> None:
    run.model = copy.deepcopy(run.model)
    next(p for n, p in run.model.named_parameters() if "base_layer.weight" in n).data += 1e-7


def moved_after(step: Step) -> None:
    step.after = {n: t + 1e-9 + 1e-7 * t for n, t in step.after.items()}


def other_dropout(step: Step) -> None:
    for name in ("raw", "clipped", "after"):
        setattr(step, name, {n: t * (1 + 1e-3) for n, t in getattr(step, name).items()})


def without_gradient(step: Step) -> None:
    other_dropout(step)
    step.raw = {n: torch.zeros_like(t) for n, t in step.raw.items()}


def in_eval_mode_and_elsewhere(step: Step) -> None:
    in_eval_mode(step)
    other_dropout(step)


def evaluated_in_training_mode(run: RecordedRun) -> None:
    for _, forward in run.trace.evaluations:
        forward.training = True


def in_eval_mode(step: Step) -> None:
    for forward in step.forwards:
        forward.training = False


def one_step_more(run: RecordedRun) -> None:
    run.trace.steps = [*run.trace.steps, run.trace.steps[-1]]


def untrained(run: RecordedRun) -> None:
    run.trace.steps[-1].after = dict(run.trace.steps[0].before)


def always_large(run: RecordedRun) -> None:
    for step in run.trace.steps:
        norm = sum(float(t.pow(2).sum()) for t in step.raw.values()) ** 0.5
        step.raw = {n: 2 * t / norm for n, t in step.raw.items()}


def halved_evaluation(run: RecordedRun) -> None:
    for entry in run.log:
        if "eval_loss" in entry:
            entry["eval_loss"] /= 2  # type: ignore[index]


def norm_of(step: Step) -> float:
    return sum(float(t.double().pow(2).sum()) for t in step.raw.values()) ** 0.5


@dataclass(frozen=True)
class Case:
    """The check that must fail, how runs are changed, a regular expression for its message, and which runs change."""

    check: str
    tamper: Tamper
    says: str
    only: dict[str, Any] = field(default_factory=dict)


OVERFIT = {"steps": 60}
PACKED = {"packing": True}
EVALUATED = {"eval_every": 2}
CASES = (
    Case("mask_reaches_the_loss", at_step(2, other_rows), "rows, step 2: no row of the data went through the model"),
    Case("gradient_is_that_of_the_token_mean", at_step(2, not_a_number), "step 2: .* is not finite"),
    Case("every_row_is_seen_once_per_epoch", repeat_first_step, "seen 2 times, another 0"),
    Case("row_order_is_shuffled_by_seed_and_epoch", same_epochs, "same order in the first and in the second epoch"),
    Case("packed_rows_are_isolated_and_whole", lose_last_pack, "seen 2 times, another 0", PACKED),
    Case("evaluation_keeps_rows_apart", noise_behind_padding, "attends to neighbours or padding", PACKED),
    Case("evaluation_computes_what_was_trained", noise_in_evaluation, "off what base and adapters compute$", EVALUATED),
    Case("evaluation_computes_what_was_trained", evaluated_on_the_base, "without its adapters", EVALUATED),
    Case("model_computes_what_was_requested", at_step(1, moved_b), "1 adapters act before the first step"),
    Case(
        "trained_parameters_and_moments_are_fp32",
        every_step(coarse),
        r"is trained in torch.bfloat16 \(24|is trained in",
    ),
    Case("trained_parameters_and_moments_are_fp32", every_step(coarse_moments), "has moments in torch.bfloat16"),
    Case("no_adapter_is_dead", unmoved, "1 of 24 trained parameters never moved"),
    Case("gradient_is_that_of_the_token_mean", every_step(scaled("raw", 1.75)), "it is 1.75 times the token mean"),
    Case(
        "accumulation_does_not_change_the_gradient", every_step(scaled("raw", 2)), "it is 2 times", {"accumulation": 2}
    ),
    Case(
        "masked_positions_get_no_gradient", every_step(gradient_at_masked_position), r"position 0 \(id \d+, 1.0e-12\)"
    ),
    Case(
        "checkpointing_does_not_change_the_gradient",
        every_step(scaled("raw", 1.01)),
        r"1.01 times .*gradient_checkpointing=True",
        {"gradient_checkpointing": True},
    ),
    Case("logged_loss_is_the_loss", logged("loss", lambda x: 2 * x), "step 1: the log says .* it is 2 times the loss"),
    Case("gradient_is_clipped_to_its_global_norm", every_step(clipped_by(lambda n, t: t)), "it was not clipped"),
    Case(
        "gradient_is_clipped_to_its_global_norm",
        every_step(lambda step: setattr(step, "clipped", {n: t * 1000 / norm_of(step) for n, t in step.raw.items()})),
        "the coefficient is inverted",
        {"max_grad_norm": 1000.0},
    ),
    Case(
        "gradient_is_clipped_to_its_global_norm",
        every_step(clipped_by(lambda n, t: t.clamp(-0.05, 0.05))),
        "likely cause: it is clipped by value",
        {"max_grad_norm": 0.05},
    ),
    Case(
        "gradient_is_clipped_to_its_global_norm",
        every_step(clipped_by(lambda n, t: t * min(1.0, 0.05 / max(float(t.norm()), 1e-30)))),
        "each parameter or group is clipped by its own norm",
        {"max_grad_norm": 0.05},
    ),
    Case(
        "gradient_is_clipped_to_its_global_norm",
        every_step(clipped_to(0.02)),
        "the limit is 0.02, not 0.05",
        {"max_grad_norm": 0.05},
    ),
    Case("gradient_is_that_of_the_token_mean", twice_the_first_token, "counts 2 times as much .* not asked for"),
    Case(
        "update_follows_adamw", at_step(2, without_forward), "no forward pass is between this step and the one before"
    ),
    Case(
        "learning_rate_follows_the_schedule",
        rate(lambda i, r: 5e-3 * (min(i / 2, 1) if i < 3 else (1 + math.cos(math.pi * (i - 2) / 7)) / 2)),
        "the decay ends after 9 steps, not 6",
        {"schedule": "cosine"},
    ),
    Case(
        "learning_rate_follows_the_schedule",
        rate(lambda i, r: 5e-3 * (min(i / 2, 1) if i < 3 else 0.6 + 0.4 * math.cos(math.pi * (i - 2) / 4))),
        "the decay ends at 0.2 times the peak, not at 0",
        {"schedule": "cosine"},
    ),
    Case(
        "learning_rate_follows_the_schedule",
        rate(lambda i, r: 5e-3 * (1 - i / 5)),
        "the decay ends after 5 steps, not 4, or at 0.2 times the peak",
        {"schedule": "linear"},
    ),
    Case(
        "logged_gradient_norm_is_the_one_before_clipping",
        logged("grad_norm", lambda x: 0.05),
        "it is the one after clipping",
    ),
    Case(
        "learning_rate_follows_the_schedule", rate(lambda i, r: 5e-3), "there is no warm-up", {"schedule": "constant"}
    ),
    Case(
        "learning_rate_follows_the_schedule",
        rate(lambda i, r: min(i, 2) / 2 * 5e-3),
        "does not change",
        {"schedule": "cosine"},
    ),
    Case(
        "schedule_horizon_counts_optimizer_steps",
        rate(lambda i, r: 5e-3 * (1 - i / 8)),
        "stretched over 8 steps, not 4",
    ),
    Case("logged_learning_rate_is_the_one_applied", logged("learning_rate", lambda x: x + 1e-3), "the update used"),
    Case("update_follows_adamw", every_step(empty_group), "a parameter group with its own learning rate"),
    Case("small_updates_are_not_lost", every_step(lambda step: setattr(step, "after", step.before)), "off AdamW's"),
    Case(
        "optimizer_holds_every_trained_parameter", without_first_in_groups, "1 of 24 trained parameters are in no group"
    ),
    Case("optimizer_holds_every_trained_parameter", in_two_groups, "24 parameters are in more than one group"),
    Case("base_is_unchanged_by_training", changed_base, "of the base has changed"),
    Case(
        "logging_and_saving_do_not_change_the_run",
        at_step(3, moved_after),
        "saving every 2 steps .* after step 3",
        {"save_every": 2},
    ),
    Case(
        "logging_and_saving_do_not_change_the_run",
        at_step(3, other_dropout),
        "evaluating .* gradient on the same rows",
        {"eval_every": 2},
    ),
    Case(
        "logging_and_saving_do_not_change_the_run",
        at_step(3, without_gradient),
        "saving .*: 24 of them have no gradient",
        {"save_every": 2},
    ),
    Case(
        "logging_and_saving_do_not_change_the_run",
        at_step(3, in_eval_mode_and_elsewhere),
        "evaluating .*: it ran in eval mode",
        {"eval_every": 2},
    ),
    Case("evaluation_runs_in_eval_mode", evaluated_in_training_mode, "ran in training mode"),
    Case("evaluation_runs_in_eval_mode", at_step(3, in_eval_mode), "step 3 ran in eval mode"),
    Case("two_conversations_reach_a_loss_below_a_hundredth", untrained, "the loss is 8", OVERFIT),
    Case("every_turn_has_learned_to_stop", untrained, r"the stop token <\|user\|>", OVERFIT),
    Case("logged_evaluation_loss_is_the_loss", halved_evaluation, "0.5 times as much", {"eval_every": 2}),
    Case("gradient_norms_are_stable", at_step(60, scaled("raw", 3000)), "norm at step 60", OVERFIT),
    Case("gradient_norms_are_stable", at_step(60, scaled("raw", float("nan"))), "not finite", OVERFIT),
    Case("gradient_norms_are_stable", always_large, "it falls to 0.2 of the first", OVERFIT),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.check}-{case.says[:20]}")
def test_fails_for_a_recording_in_which_it_does_not_hold(case: Case, healthy: Trial, tmp_path: Path) -> None:
    trial = Tampered(healthy.subject, healthy.base_dir, tmp_path, healthy=healthy, tamper=case.tamper, only=case.only)
    with pytest.raises(CheckFailed) as caught:
        CHECKS[case.check].run(trial)
    assert re.search(case.says, str(caught.value)), str(caught.value)


RESUMED = (
    (one_step_more, "steps follow, not"),
    (reversed_steps, "starts from other parameters"),
    (at_step(2, moved_after), "though its gradient is the same: the optimizer's moments"),
    (at_step(2, lambda step: setattr(step, "forwards", step.forwards[:0])), "step 5 trains on other rows"),
    (rate(lambda i, r: 5e-3), "the learning rate at step 4 is 0.005"),
    (at_step(2, other_dropout), "and so does its gradient on the same rows"),
)


@pytest.mark.parametrize(("tamper", "says"), RESUMED, ids=lambda value: value if isinstance(value, str) else "")
def test_resumed_run_that_goes_another_way_is_named(tamper: Tamper, says: str, healthy: Trial, tmp_path: Path) -> None:
    class Resumed(Tampered):
        def run_anew(self, of: str = "short", **changes: Any) -> RecordedRun:
            self.tamper = tamper if changes.get("resume_from") else lambda run: None
            return super().run_anew(of, **changes)

    trial = Resumed(healthy.subject, healthy.base_dir, tmp_path, healthy=healthy)
    with pytest.raises(CheckFailed, match=re.escape(says)):
        CHECKS["resumed_run_equals_the_uninterrupted_run"].run(trial)


@pytest.mark.parametrize("has_moments", [True, False])
def test_dropout_that_equal_runs_do_not_share_is_not_held_against_a_resumed_one(
    has_moments: bool, healthy: Trial, tmp_path: Path
) -> None:
    number = itertools.count()

    class Unlike(Tampered):
        def run_anew(self, of: str = "short", **changes: Any) -> RecordedRun:
            if changes.get("dropout"):
                self.tamper = at_step(1, scaled("after", 1 + 1e-6 * next(number)))
            else:
                is_tampered = changes.get("resume_from") and not has_moments
                self.tamper = at_step(2, moved_after) if is_tampered else lambda run: None
            return super().run_anew(of, **changes)

    trial = Unlike(healthy.subject, healthy.base_dir, tmp_path, healthy=healthy)
    if has_moments:
        CHECKS["resumed_run_equals_the_uninterrupted_run"].run(trial)
    else:
        with pytest.raises(CheckFailed, match="moments"):
            CHECKS["resumed_run_equals_the_uninterrupted_run"].run(trial)


@pytest.mark.slow
def test_processes_that_drift_or_overlap_are_named(healthy: Trial, tmp_path: Path) -> None:
    """A run in two processes, healthy, then tampered with: not reduced, averaged twice, or the same shard twice."""
    run, traces = run_of_ranks(healthy)
    for name in (
        "processes_see_each_row_once_per_epoch",
        "processes_train_as_one_process_would",
        "schedule_is_the_same_on_several_processes",
    ):
        CHECKS[name].run(healthy)

    def tampered(tamper: Callable[[RecordedRun, Any], None]) -> Trial:
        changed = replace(run, trace=copy.deepcopy(run.trace)), copy.deepcopy(traces)
        tamper(*changed)
        return Trial(healthy.subject, healthy.base_dir, tmp_path, shared={"ranks": changed})

    def drift(run: RecordedRun, traces: Any) -> None:
        scaled("after", 1.001)(traces[1].steps[0])

    def averaged_twice(run: RecordedRun, traces: Any) -> None:
        for step in run.trace.steps:
            scaled("raw", 0.5)(step)
            step.forwards = [replace(f, gradient_BTD=f.gradient_BTD / 2) for f in step.forwards]

    def overlap(run: RecordedRun, traces: Any) -> None:
        for step in run.trace.steps:
            step.forwards = step.forwards[:2] * 2

    with pytest.raises(CheckFailed, match="step 1: the 2 processes hold different parameters after it"):
        CHECKS["processes_train_as_one_process_would"].run(tampered(drift))
    with pytest.raises(CheckFailed, match="divided by the number of processes twice"):
        CHECKS["processes_train_as_one_process_would"].run(tampered(averaged_twice))
    with pytest.raises(CheckFailed, match="seen 2 times by process 0, another 0 times"):
        CHECKS["processes_see_each_row_once_per_epoch"].run(tampered(overlap))
    with pytest.raises(CheckFailed, match="the learning rate is"):
        CHECKS["schedule_is_the_same_on_several_processes"].run(tampered(lambda run, _: rate(lambda i, r: r / 2)(run)))
