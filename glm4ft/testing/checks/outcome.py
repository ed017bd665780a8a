"""Checks of a whole run: what it leaves alone, what it can be loaded from, and what it has learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open

from glm4ft.generation import greedy
from glm4ft.testing.checks.registry import CheckFailed, NotApplicable, check
from glm4ft.testing.checks.trial import OVERFIT_STEPS, Trial
from glm4ft.testing.reference import clip_factor
from glm4ft.testing.stability import assert_grad_norms_stable

NEEDS = ("build_model", "train")
LOSS_LIMIT = 0.01
# A right run leaves the header's loss where it was or raises it (by 0.6 to 1.5 nats on the built-in base); one that
# trains the header lowers it by 3.
HEADER_FALL_LIMIT = 1.0
# Largest relative difference of logits through a save and a load, or a merge, in fp32.
LOGITS_LIMIT = 1e-4


@check(stage="side-effects", needs=NEEDS, incident="OpenRLHF 1253: frozen weights decay; ms-swift 9452")
def check_base_is_untouched(trial: Trial) -> None:
    """After training every tensor of the base has the bits it had on the disk."""
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in trial.overfit.model.state_dict().items()
        if "lora_" not in name
    }
    for shard in sorted(trial.base_dir.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                if name not in weights:
                    raise CheckFailed(f"the trained model has no {name}")
                if not torch.equal(weights[name].cpu(), file.get_tensor(name).to(weights[name].dtype)):
                    raise CheckFailed(f"{name} of the base has changed")


@check(stage="persistence", needs=(*NEEDS, "save", "load"), incident="PEFT 2118: keys renamed, nothing loaded")
def check_adapter_survives_the_disk(trial: Trial) -> None:
    """Saved and loaded onto a fresh base, the adapter gives the same logits."""
    folder = str(trial.folder / "saved")
    trial.subject.save(trial.overfit.model, folder)
    _require_same_logits(trial, trial.subject.load(str(trial.base_dir), folder), "loaded")


@check(stage="persistence", needs=(*NEEDS, "save", "merge"), incident="PEFT 2489: merged without its scale")
def check_merged_model_is_the_adapted_one(trial: Trial) -> None:
    """The merged checkpoint, in plain transformers, gives the adapted model's logits."""
    from transformers import AutoModelForCausalLM

    folder, output = str(trial.folder / "to-merge"), str(trial.folder / "merged")
    trial.subject.save(trial.overfit.model, folder)
    trial.subject.merge(str(trial.base_dir), folder, output)
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    _require_same_logits(trial, merged, "merged")


@check(stage="outcome", needs=NEEDS, incident="zai-org/GLM-4 342: two samples, the loss stops at 0.2")
def check_two_conversations_reach_a_loss_below_a_hundredth(trial: Trial) -> None:
    """The mean loss over what the subject trains, computed by the harness on the final adapter."""
    loss = float(trial.overfit.reference.loss(trial.rows(trial.demo), trial.overfit.trained))
    if not loss < LOSS_LIMIT:
        raise CheckFailed(
            f"the loss is {loss:.4f} after {OVERFIT_STEPS} steps on two conversations, not < {LOSS_LIMIT}"
        )


@check(stage="outcome", needs=NEEDS, incident="zai-org/GLM-4 342: the terminator is not trained; TRL 6044")
def check_every_turn_has_learnt_to_stop(trial: Trial) -> None:
    """The token that ends each assistant turn is all but certain."""
    nll = [(row, at, trial.overfit.nll(row)[at]) for row in trial.rows(trial.demo) for _, at in _turns(trial, row[0])]
    row, at, worst = max(nll, key=lambda found: found[2])
    if not worst < 10 * LOSS_LIMIT:
        token = trial.subject.tokenizer.decode([row[0][at]])
        raise CheckFailed(f"the stop token {token} at position {at} has a loss of {worst:.2f}: it is not learnt")


@check(stage="outcome", needs=NEEDS, incident="zai-org/GLM-4 342: <|assistant|> as a target")
def check_header_is_not_learnt(trial: Trial) -> None:
    """The header is given at inference, so its loss does not fall."""
    base = {name: torch.zeros_like(t) if ".lora_B." in name else t for name, t in trial.overfit.trained.items()}
    for row in trial.rows(trial.demo):
        for header, _ in _turns(trial, row[0]):
            before, after = (trial.overfit.nll(row, adapter)[header] for adapter in (base, trial.overfit.trained))
            if not after > before - HEADER_FALL_LIMIT:
                token = trial.subject.tokenizer.decode([row[0][header]])
                raise CheckFailed(
                    f"the loss of {token} at position {header} fell from {before:.2f} to {after:.2f}: it is trained, "
                    "though inference gives it"
                )


@check(stage="outcome", needs=NEEDS, incident="TRL 6044, axolotl 3754: loss near zero, generation never stops")
def check_every_turn_comes_back_and_stops(trial: Trial) -> None:
    """Prompted as serving prompts, greedy decoding says each answer and then its stop token."""
    model = trial.overfit.model.eval()
    for row in trial.rows(trial.demo):
        for header, end in _turns(trial, row[0]):
            expected = list(row[0][header + 1 : end + 1])
            stops = getattr(trial.subject, "stop_ids", None) or [expected[-1]]
            got = greedy(model, list(row[0][: header + 1]), list(stops), len(expected) + 16)
            if got != expected:
                said, meant = (trial.subject.tokenizer.decode(ids) for ids in (got, expected))
                raise CheckFailed(f"the model says {said!r} where it learnt {meant!r}")


@check(stage="outcome", needs=NEEDS, incident="zai-org/GLM-4 342: a norm of 32.75 beside 0.01")
def check_gradient_norms_are_stable(trial: Trial) -> None:
    """Every norm is finite and none jumps out of its neighbourhood."""
    try:
        assert_grad_norms_stable([clip_factor(step.raw, 0)[0] for step in trial.overfit.trace.steps])
    except AssertionError as error:
        raise CheckFailed(str(error)) from error


def _turns(trial: Trial, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Header and terminator of each assistant turn: from one control token to the next."""
    control = trial.subject.tokenizer.get_added_vocab()
    header = control.get("<|assistant|>")
    if header is None or not getattr(trial.subject, "chat_format", None):
        raise NotApplicable("the subject names no GLM-4 chat format")
    stops = set(control.values())
    for start in (i for i, token in enumerate(ids) if token == header):
        end = next((i for i in range(start + 1, len(ids)) if ids[i] in stops), None)
        if end is not None:
            yield start, end


def _require_same_logits(trial: Trial, model: Any, how: str) -> None:
    ids = torch.tensor([list(trial.rows(trial.demo)[0][0])])
    with torch.no_grad():
        expected, got = (
            m.eval()(input_ids=ids.to(m.device)).logits.float().cpu() for m in (trial.overfit.model, model)
        )
    size = float((got - expected).norm() / expected.norm())
    if not size <= LOGITS_LIMIT:
        raise CheckFailed(f"the {how} model's logits are {size:.1e} off the trained one's")
