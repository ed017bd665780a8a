"""Claims about what is trained on the base: the requested adapters, at their scale and precision, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from glm4ft.testing.checks.base import built, logits_of
from glm4ft.testing.recording.trace import Tensors
from glm4ft.testing.replay.comparison import relative
from glm4ft.testing.replay.tolerances import LIMITS, within
from glm4ft.testing.specification.lora_spec import adapted_modules, base_name
from glm4ft.testing.subject import make_plan
from glm4ft.testing.trial.interventions import adapter_dropouts
from glm4ft.testing.trial.plans import NAMED
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

NEEDS = ("build_model", "train")
EVALUATED = next(plan for plan in NAMED if plan.name == "accumulated and evaluated")


@check(stage="model", needs=NEEDS, incident="torchtune 1049, TRL 3337: evaluated with dropout on")
def check_requested_dropout_acts_in_training_alone(trial: Trial) -> None:
    """The adapters' inputs are dropped with the requested probability in training, and not at all in evaluation."""
    asked = trial.requested_dropout
    if not asked:
        raise NotApplicable("the subject's lora requests no dropout")
    model = trial.subject.build_model(str(trial.base_dir), 0)
    plan = make_plan(steps=2, output_dir=str(trial.new_folder("dropout")))
    _require_dropped(model, lambda: trial.subject.train(model, trial.conversations, plan), asked, "training")
    if getattr(trial.subject, "evaluate", None):
        _require_dropped(model, lambda: trial.subject.evaluate(model, trial.conversations), 0.0, "evaluation")


@check(stage="model", needs=NEEDS, incident="torchdistx 52, verl-omni 73: bf16 weights lose updates; PEFT 2893")
def check_trained_parameters_and_moments_are_fp32(trial: Trial) -> None:
    """Trained parameters and the optimizer's moments are fp32, since small steps vanish in a coarser type.

    A step below half an ulp is rounded away: 50 AdamW steps of 1e-4 on 0.5 change nothing in bf16.
    """
    steps = trial.run().trace.steps
    if not steps:
        raise NotApplicable("not judged: there was no step")
    for number, step in enumerate(steps, start=1):
        for what, dtypes in (
            ("is trained", {n: t.dtype for n, t in step.after.items()}),
            ("has moments", step.state_dtypes),
        ):
            coarse = [name for name, dtype in dtypes.items() if dtype not in (torch.float32, torch.float64)]
            if coarse:
                raise CheckFailed(f"step {number}: {coarse[0]} {what} in {dtypes[coarse[0]]} ({len(coarse)} like it)")


@check(
    stage="model", needs=("build_model",), incident="axolotl's GLM-4 example names gate_proj; PEFT 3318, 2195 and 3315"
)
def check_adapters_are_on_the_requested_modules(trial: Trial) -> None:
    """Exactly the requested modules have adapters, each with its requested rank."""
    asked, model = trial.lora_spec, built(trial)
    parameters = dict(model.named_parameters())
    found = trial.reference.adapters(parameters)
    wanted = asked.modules_of(trial.reference.model)
    targets = (asked.targets if isinstance(asked.targets, tuple) else ()) + asked.parameters
    every = [f".{name}" for name in (*trial.reference.modules, *trial.reference.weights)]
    unmatched = [target for target in targets if not any(name.endswith(f".{target}") for name in every)]
    if unmatched:
        raise CheckFailed(f"{', '.join(unmatched)} was asked for, but no module of the base has that name")
    for words, names in (("has no adapter", set(wanted) - set(found)), ("was not asked for", set(found) - set(wanted))):
        if names:
            raise CheckFailed(f"{min(names)} {words} ({len(names)} like it; {len(found)} adapters for {len(wanted)})")
    for module, pair in found.items():
        ranks = trial.reference.rank_of(module, pair, parameters)
        if ranks != {asked.rank_of(module)}:
            raise CheckFailed(f"the adapter of {module} has rank {max(ranks)}, not {asked.rank_of(module)}")
        if ("magnitude_vector" in pair) != asked.decomposed:
            words = "no magnitude, though DoRA was" if asked.decomposed else "a magnitude, though DoRA was not"
            raise CheckFailed(f"the adapter of {module} has {words} requested")
        if asked.decomposed:
            norms, got = (t.detach().float().cpu() for t in (trial.reference.weights[f"{module}.weight"].norm(dim=1),
                                                             parameters[pair["magnitude_vector"]]))  # fmt: skip
            if not float((got - norms).norm() / norms.norm()) <= LIMITS[trial.dtype]:
                raise CheckFailed(f"the magnitudes of {module} do not start as the norms of its weight's rows")


@check(
    stage="model", needs=("build_model",), incident="PEFT 2489, 2775 and 1930: no scale, or alpha over the root of r"
)
@torch.no_grad()
def check_adapters_act_at_the_requested_scale(trial: Trial) -> None:
    """With random A and B, each adapter adds alpha / r times ``B A x``, one at a time and all together."""
    model, base = built(trial).eval(), trial.reference
    parameters = dict(model.named_parameters())
    found = base.adapters(parameters)
    if not found:
        raise NotApplicable("the model has no LoRA matrices by peft's names")
    ids = trial.rows(trial.conversations)[0][0]
    for module, pair in [*found.items(), ("all modules", {})]:
        for other in found.values():
            _fill(parameters[other["B"]], 0.0 if pair else 0.02)
        if pair:
            _fill(parameters[pair["B"]], 0.05)
            if not parameters[pair["A"]].any():  # that of an embedding, of which B is drawn
                _fill(parameters[pair["A"]], 0.05)
        trained = {n: parameters[n].detach().float().cpu() for names in found.values() for n in names.values()}
        got_TV = logits_of(model, ids)
        expected_TV = base.logits(base.hidden(ids, trained), trained)
        size = float((got_TV - expected_TV).norm() / expected_TV.norm())
        if not within("model: logits with adapters at random", size, LIMITS[trial.dtype]):
            asked, explained = base.lora_spec.scale_of(module), _scale_words(trial, module, pair, trained, got_TV)
            scale = f" instead of {asked:.4g}: {explained}"
            raise CheckFailed(f"with random A and B the adapter of {module} is {size:.1e} off{scale if pair else ''}")


@check(stage="model", needs=("build_model",), incident="PEFT 282, TRL 4081, transformers 24463: everything was frozen")
def check_only_what_was_asked_for_is_trained(trial: Trial) -> None:
    """Exactly the LoRA matrices, and whatever else was requested, require a gradient."""
    trained = {name for name, p in built(trial).named_parameters() if p.requires_grad}
    all_matrices = {
        n
        for pair in adapted_modules([name for name, _ in built(trial).named_parameters()]).values()
        for n in pair.values()
    }
    spec, asked = trial.lora_spec, getattr(trial.subject, "lora", None) or {}
    saved, bias = tuple(asked.get("modules_to_save") or ()), asked.get("bias") or "none"
    frozen = sorted(all_matrices - trained)
    beside = {n: f".{base_name(n)}".rpartition(".") for n in trained - all_matrices}
    biases = {n for n, (_, _, last) in beside.items() if last == "bias" and (bias == "all" or ".base_layer" in n)}
    requested = biases if bias != "none" else set[str]()
    requested |= {n for n, (module, _, _) in beside.items() if module.endswith(saved)}
    more = sorted(beside.keys() - requested)
    lost = [name for name in saved if not any(module.endswith(name) for module, _, _ in beside.values())]
    if not trained:
        raise CheckFailed("no parameter is trained: all of them are frozen")
    if lost:
        raise CheckFailed(f"modules_to_save asks for {', '.join(lost)}, of which no parameter is trained")
    adapted = {f"{name}.bias" for name in spec.modules_of(trial.reference.model)} & trial.reference.weights.keys()
    if bias != "none" and adapted and not biases:
        raise CheckFailed(f"bias={bias!r} was asked for, and no bias is trained, as {min(adapted)}")
    if frozen:
        raise CheckFailed(f"{len(frozen)} of {len(all_matrices)} LoRA matrices are frozen, as {frozen[0]}")
    if more:
        raise CheckFailed(f"{len(more)} trained parameters belong to no adapter, as {more[0]}")


@check(stage="model", needs=("build_model",), incident="a seed that reaches nothing repeats one run")
def check_adapters_depend_on_the_seed_alone(trial: Trial) -> None:
    """Two models of one seed have equal trained parameters, and those of another seed differ."""
    one, again, other = (
        {name: p.detach() for name, p in trial.subject.build_model(str(trial.base_dir), seed).named_parameters()
         if p.requires_grad} for seed in (0, 0, 1)
    )  # fmt: skip
    unequal = [name for name in one if name not in again or not torch.equal(one[name], again[name])]
    if unequal:
        raise CheckFailed(f"two models of seed 0 differ in {len(unequal)} trained parameters, e.g. {unequal[0]}")
    if one and all(name in other and torch.equal(one[name], other[name]) for name in one):
        raise CheckFailed("models of seed 0 and seed 1 have the same trained parameters: the seed reaches nothing")


@check(stage="model", needs=NEEDS, incident="unsloth 9331: a fused loss read lm_head.weight, so its adapter never ran")
def check_no_adapter_is_dead(trial: Trial) -> None:
    """After a few steps, every matrix B differs from zero and every matrix A from its initial value."""
    steps = trial.run().trace.steps
    if len(steps) < 2:
        raise NotApplicable("not judged: fewer than two steps")
    for step, following in pairwise(steps):
        if any(
            torch.equal(following.before[n], t) and not torch.equal(step.after[n], t) for n, t in step.before.items()
        ):
            raise NotApplicable(
                "not judged: steps are undone before the next one, which the checks of the update report"
            )
    first = steps[0].before
    held = {name for group in steps[0].groups for name in group.names}  # what is in no group is the update's fault
    moved = {name for name, start in first.items() if not torch.equal(start, steps[-1].after[name])}
    if dead := [name for name in first if name in held - moved]:
        raise CheckFailed(f"{len(dead)} of {len(first)} trained parameters never moved, as {dead[0]}")


@check(stage="model", needs=NEEDS, incident="ms-swift 9832, PEFT 2893: another precision than was asked for")
def check_forward_passes_have_the_requested_autocast(trial: Trial) -> None:
    """Forward passes of training run under the autocast that the subject requests, or under none."""
    if not hasattr(trial.subject, "autocast"):
        raise NotApplicable("the subject does not state whether autocast was requested")
    asked = {"bf16": "bfloat16", "fp16": "float16"}.get(trial.subject.autocast)
    found = trial.run().trace.autocast
    if found != asked:
        raise CheckFailed(f"forward passes run under autocast to {found}, requested was {asked}")


@check(stage="model", needs=NEEDS, incident="verl 3830: validated without the adapters")
def check_evaluation_computes_what_was_trained(trial: Trial) -> None:
    """While a run evaluates, the model computes what the base and the adapters trained so far compute.

    Judged of rows that follow no other and no padding; whether the others are kept apart is a claim about batches.
    """
    run, limit = trial.run_plan(EVALUATED), LIMITS[trial.dtype]
    run.require_sound_model()
    if not (rows := [row for row in run.evaluated if not row.span.start]):
        raise NotApplicable("the trainer was asked to evaluate and did not")
    for row in rows:
        if not within("model: rows of an evaluation", row.size, limit):
            is_base = run.size_off(row.span.ids, row.hidden_TD, {}) <= limit
            cause = "it is evaluated without its adapters" * is_base
            raise CheckFailed(
                f"evaluated after step {row.num_steps}, a row of {len(row.span.ids)} tokens is {row.size:.1e} off what "
                "base and adapters compute" + f"; likely cause: {cause}" * is_base,
                cause=cause,
            )


@check(stage="model", needs=NEEDS, incident="mlx-lm 1698: all of each head rotated; PEFT 2489: scale left out")
def check_model_computes_what_was_requested(trial: Trial) -> None:
    """In every recorded run, the model computes what the base on the disk and the requested adapters compute.

    It runs as the last check of its stage, since the others report more precisely what is wrong.
    """
    try:
        trial.require_plans("model_computes_what_was_requested", "model")
    except CheckFailed as error:
        if error.cause or not (cause := _cause_in_training(trial)):
            raise
        raise CheckFailed(f"{error}\nlikely cause: {cause}", cause=cause) from error


def _cause_in_training(trial: Trial) -> str:
    """What is wrong if a run's model is off in training and right whenever it evaluates; "" if no such run shows it."""
    try:
        run = trial.run_plan(EVALUATED)
    except NotImplementedError:  # the subject never evaluates
        return ""
    if "model" not in run.verdict.departures:  # it departs under other plans only
        return ""
    rows = [row for row in run.evaluated if not row.span.start]
    is_right = bool(rows) and all(row.size <= LIMITS[trial.dtype] for row in rows)
    return "something acts in training alone, as noise or dropout: in evaluation the model is right" * is_right


def _require_dropped(model: Any, use: Callable[[], Any], expected: float, where: str) -> None:
    """Fail if the dropout layers in front of adapters set another share of their inputs to zero than expected."""
    dropped = total = 0

    def count(layer: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal dropped, total
        given = args[0] != 0
        dropped, total = dropped + int((given & (output == 0)).sum()), total + int(given.sum())

    hooks = [layer.register_forward_hook(count) for layer in adapter_dropouts(model)]
    try:
        use()
    finally:
        for hook in hooks:
            hook.remove()
    if expected and not total:
        raise CheckFailed(f"no dropout layer is in front of an adapter, where a rate of {expected:g} was requested")
    # six standard deviations of a binomial share
    spread = 6 * (expected * (1 - expected) / max(total, 1)) ** 0.5
    if total and not abs(dropped / total - expected) <= spread:
        found = f"{dropped / total:.4f} of {total:,} entries in front of the adapters are dropped"
        raise CheckFailed(f"in {where}, {found}, not {expected:g}: dropout acts at another rate than requested")


def _fill(parameter: torch.Tensor, std: float) -> None:
    generator = torch.Generator().manual_seed(parameter.numel())
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _scale_words(trial: Trial, module: str, pair: dict[str, str], trained: Tensors, got_TV: torch.Tensor) -> str:
    """Names the scale of one module's adapter that explains the logits."""
    base, asked = trial.reference, trial.lora_spec
    rank, alpha = asked.rank_of(module), asked.alpha_of(module)
    ids = trial.rows(trial.conversations)[0][0]
    candidates = {"1, so none": 1.0, "0, so it does not act": 0.0, "alpha / sqrt(r)": alpha / rank**0.5, "alpha / r":
                  alpha / rank, "alpha": alpha, "that of another alpha": asked.alpha / rank,
                  "that of another rank": alpha / asked.rank}  # fmt: skip
    for words, scale in candidates.items():
        changed = {**trained, pair["B"]: trained[pair["B"]] * scale / asked.scale_of(module)}
        logits_TV = base.logits(base.hidden(ids, changed), changed)
        if relative({"": got_TV}, {"": logits_TV}) <= LIMITS[trial.dtype]:
            return f"it acts at scale {words} ({scale:.4g})"
    return "no likely scale explains it"
