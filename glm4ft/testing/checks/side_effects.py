"""Claims about side effects: the base stays unchanged, and logging, evaluating and saving do not change a run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open

from glm4ft.testing.recording.record import record
from glm4ft.testing.specification.lora_spec import base_name
from glm4ft.testing.specification.routed_experts import stored_in
from glm4ft.testing.subject import make_plan
from glm4ft.testing.trial.interventions import spoiling
from glm4ft.testing.trial.plans import PLANS
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.same_run import changed_after_last_step, describe_divergence, explain_by_noise
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

NEEDS = ("build_model", "train")
WATCHING: dict[str, dict[str, Any]] = {
    "logging": {"log_every": 3},
    "evaluating": {"eval_every": 2},
    "saving": {"save_every": 2},
}


@check(stage="side-effects", needs=NEEDS, incident="OpenRLHF 1253: frozen weights decay; ms-swift 9452")
def check_base_is_unchanged_by_training(trial: Trial) -> None:
    """After training, the base has the bits it has on the disk, and trained parameters are those of the last update."""
    state = trial.trained.model.state_dict().items()
    weights = {base_name(name): tensor for name, tensor in state if "lora_" not in name}
    trained = {base_name(name) for name in trial.trained.trace.trained}
    for shard in sorted(trial.base_dir.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                found = stored_in(name, weights)
                if found is None:
                    raise CheckFailed(f"the trained model has no {name}")
                parameter, weight = found
                stored = file.get_tensor(name).to(weight.dtype)
                if parameter not in trained and not torch.equal(weight.cpu(), stored):
                    raise CheckFailed(f"{name} of the base has changed")
    if changed_after_last_step(trial.trained):
        raise CheckFailed("the parameters after training are not those of its last update")


@check(stage="side-effects", needs=NEEDS, incident="torchtune 1049, TRL 3337: evaluated with dropout on")
def check_evaluation_runs_in_eval_mode(trial: Trial) -> None:
    """Dropout and trained modules are in eval mode while a run evaluates or generates, in training mode afterwards."""
    run = trial.run(**WATCHING["evaluating"])
    passes = [forward for _, forward in run.trace.evaluated]
    for _, use in _parts_that_look(trial, trial.trained.model.train()):
        with record(trial.trained.model, 1) as trace:
            use()
        passes += [forward for _, forward in trace.evaluated]
    if not passes:
        raise NotApplicable("the subject evaluated nothing")
    wrong = sum(forward.training is not False for forward in passes)
    if wrong:
        raise CheckFailed(
            f"{wrong} of {len(passes)} forward passes of evaluation or generation ran in training mode: dropout is on"
        )
    for number, step in enumerate(run.trace.steps, start=1):
        if not all(forward.training for forward in step.forwards):
            raise CheckFailed(f"step {number} ran in eval mode: evaluation did not restore training mode")


@check(stage="side-effects", needs=NEEDS, incident="no seed was set before training: runs with dropout never repeat")
def check_one_seed_repeats_one_run(trial: Trial) -> None:
    """Two runs by one plan are the same bit by bit, dropout included: the plan's seed seeds all random numbers."""
    if found := describe_divergence(trial.run(), trial.again):
        raise NotApplicable(f"not judged: two equal runs differ even without dropout: {found}")
    if not trial.noise:
        raise CheckFailed(
            "two runs by one plan are the same without dropout and differ with it: the random numbers of training do "
            "not come from the plan's seed"
        )


@check(
    stage="side-effects",
    needs=NEEDS,
    incident="ms-swift 9452: no training after the first save; seq2seq 38: no train()",
)
def check_logging_and_saving_do_not_change_the_run(trial: Trial) -> None:
    """A run with logs, evaluations and checkpoints has the parameters of a run without them, bit by bit."""
    noise = trial.noise
    bare = trial.run(**noise)
    if not noise and describe_divergence(bare, trial.again):
        raise NotApplicable("not judged: two equal runs differ, so there is nothing to compare with")
    everything: dict[str, Any] = {name: value for changes in WATCHING.values() for name, value in changes.items()}
    watched = trial.run(**everything, **noise)
    together = describe_divergence(bare, watched)
    if not together:
        if watched.model is not None and changed_after_last_step(watched):
            raise CheckFailed(
                "with evaluations and checkpoints, the parameters after training are not those of its last update"
            )
        return
    for name, changes in WATCHING.items():
        found = describe_divergence(bare, trial.run(**changes, **noise))
        if found and noise:
            found = explain_by_noise(found, describe_divergence(trial.run(), trial.run(**changes)))
        if found:
            raise CheckFailed(f"{name} every {next(iter(changes.values()))} steps changes the run: {found}")
    raise CheckFailed(f"logging, evaluating and saving together change the run: {together}")


@check(stage="side-effects", needs=NEEDS, incident="an evaluation reset the count of micro-batches of the next step")
def check_evaluating_and_saving_change_no_other_plan(trial: Trial) -> None:
    """No plan with evaluations or saves departs from the specification where the same plan without them does not."""
    judged = 0
    for plan in trial.asked(PLANS):
        if plan.uninterrupted() is None:
            continue
        with contextlib.suppress(NotImplementedError):
            for stage, departure in trial.run_plan(plan).verdict.departures.items():
                if trial.departs_interrupted_only(plan, stage):
                    raise CheckFailed(
                        f"evaluating or saving changes the run: {departure} (plan {plan}, and not without)"
                    )
            judged += 1
    if not judged:
        raise NotApplicable("the subject neither evaluates nor saves in a run")


@check(stage="side-effects", needs=NEEDS, incident="ms-swift 9452: a save switched requires_grad off; seq2seq 38")
def check_evaluating_and_saving_leave_the_model_unchanged(trial: Trial) -> None:
    """Evaluating, saving and generating change no parameter, no module's mode and no ``requires_grad``."""
    model = trial.trained.model.train()
    for name, use in _parts_that_look(trial, model):
        before, parameters = _state(model), {n: p.detach().clone() for n, p in model.state_dict().items()}
        use()
        for words, now, then in zip(("mode", "requires_grad"), _state(model), before, strict=True):
            changed = sorted(n for n in then if now.get(n) != then[n])
            if changed:
                raise CheckFailed(f"{name} changes the {words} of {len(changed)} parts, as {changed[0] or 'the model'}")
        now_state = model.state_dict()
        moved = sorted(
            n for n, tensor in parameters.items() if n not in now_state or not torch.equal(now_state[n], tensor)
        )
        if moved:
            raise CheckFailed(f"{name} changes {len(moved)} tensors of the model, as {moved[0]}")


@check(
    stage="side-effects", needs=NEEDS,
    incident="transformers 13619, TRL 6702: NaN was averaged away in the log; pytorch 46849: an infinite norm",
)  # fmt: skip
def check_numbers_that_are_not_finite_are_reported(trial: Trial) -> None:
    """A run whose loss or gradient is made NaN or infinite from outside stops, or its log shows it.

    The same holds for an evaluation: it raises an error, or its loss is not finite.
    """
    unlogged = False
    for what in ("loss", "gradient"):
        model = trial.subject.build_model(str(trial.base_dir), 0)
        plan = make_plan(steps=4, output_dir=str(trial.new_folder("spoilt")))
        with (
            record(model, plan["steps"]) as trace,
            spoiling(
                model, what, lambda _: len(trace.steps) == 1 and torch.is_grad_enabled() and not spoilt.is_trained
            ) as spoilt,
        ):
            try:
                log = list(trial.subject.train(model, trial.conversations, plan) or [])
            except Exception:  # stopping is the best answer
                continue
        if not spoilt.num_passes:
            raise NotApplicable("not judged: no forward pass of training went through the final norm")
        figures = [entry[name] for entry in log for name in ("loss", "grad_norm") if entry.get(name) is not None]
        unlogged = unlogged or not figures
        norm = log[1].get("grad_norm") if what == "gradient" and len(log) == plan["steps"] else None
        if norm is not None and math.isfinite(norm):
            raise CheckFailed(
                f"the gradient of step 2 was made infinite from outside, and the log has a norm of {norm:.4g}"
            )
        if figures and all(math.isfinite(figure) for figure in figures):
            raise CheckFailed(
                f"the {what} of step 2 was made not finite from outside, the run went on, and every figure of its log "
                "is finite: the log hides it"
            )
    if getattr(trial.subject, "evaluate", None):
        _require_reporting_evaluation(trial)
    if unlogged:
        raise NotApplicable("not judged: the run went on, and train returns no log with loss or grad_norm")


def _require_reporting_evaluation(trial: Trial) -> None:
    """Fail if an evaluation whose forward passes are made NaN reports a finite loss."""
    model = trial.trained.model
    with spoiling(model, "loss", lambda ids_BT: _holds_a_row(trial, ids_BT)) as spoilt:
        try:
            result = trial.subject.evaluate(model, trial.conversations)
        except Exception:
            return
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if spoilt.num_passes and loss is not None and math.isfinite(float(loss)):
        raise CheckFailed(
            f"the forward passes of an evaluation were made NaN from outside, and it reports a loss of {loss:.4g}"
        )


def _holds_a_row(trial: Trial, ids_BT: torch.Tensor) -> bool:
    """Whether a forward pass contains a whole conversation: it is one of the loss, and not of generation."""
    rows = {ids for ids, _ in trial.rows(trial.conversations)}
    return any(tuple(ids[: len(row)]) == row for ids in ids_BT.tolist() for row in rows)


def _parts_that_look(trial: Trial, model: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    subject = trial.subject
    if getattr(subject, "evaluate", None):
        yield "evaluate", lambda: subject.evaluate(model, trial.conversations)
    if getattr(subject, "save", None):
        yield "save", lambda: subject.save(model, str(trial.new_folder("look")))
    if getattr(subject, "generate", None):
        yield "generate", lambda: subject.generate(model, trial.conversations[0]["messages"][:1], None, 4)


def _state(model: Any) -> tuple[dict[str, bool], dict[str, bool]]:
    modes = {name: module.training for name, module in model.named_modules()}
    return modes, {name: p.requires_grad for name, p in model.named_parameters()}
