"""Claims about saved files: the adapter loads, the merged checkpoint equals the model, and a run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from glm4ft.testing.checks.served_folder import require_trained_tokenizer, stop_ids
from glm4ft.testing.replay.tolerances import within
from glm4ft.testing.specification.lora_spec import LoraSpec, NotSpecified, adapted_modules, base_name
from glm4ft.testing.specification.routed_experts import stored_in
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.same_run import describe_divergence, explain_by_noise
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

NEEDS = ("build_model", "train")
# Largest relative difference of logits through a save and a load, or a merge; measured 6e-7 on a base in fp32 and
# 1.1e-2 on one in bf16, where Trainer's autocast rounds the adapter too (x86-64 CPU, 2026-11-25).
LOGITS_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
RESUMED_PLANS: tuple[dict[str, Any], ...] = ({}, {"accumulation": 2, "micro_batch_size": 1}, {"packing": True})
RESUMED_AT = (3, 4)  # in the middle of the first epoch of the short conversations, and at its end


@check(
    stage="persistence", needs=(*NEEDS, "save"), incident="PEFT 3282 and 2334: the wrong tensors under the right names"
)
def check_saved_adapter_is_complete(trial: Trial) -> None:
    """The saved adapter contains every trained LoRA matrix, bit by bit and in its dtype, and nothing else."""
    file = _saved(trial) / "adapter_model.safetensors"
    if not file.exists():
        raise NotApplicable(f"save wrote no {file.name}")
    stored = load_file(file)
    live = {name: p.detach().cpu() for name, p in trial.trained.model.named_parameters() if "lora_" in name}
    _require_saved_modules(trial, stored)
    got, expected = adapted_modules(list(stored)), adapted_modules(list(live))
    for words, modules in (
        ("is missing", expected.keys() - got.keys()),
        ("is not part of the adapter", got.keys() - expected.keys()),
    ):
        if modules:
            raise CheckFailed(f"the saved adapter: {min(modules)} {words} ({len(modules)} like it)")
    for module, pair in expected.items():
        for matrix, name in pair.items():
            found = stored[got[module][matrix]] if matrix in got[module] else None
            if found is None or found.dtype != live[name].dtype or not torch.equal(found, live[name]):
                raise CheckFailed(f"the saved {matrix} of {module} is not the trained one")


def _require_saved_modules(trial: Trial, stored: dict[str, torch.Tensor]) -> None:
    """Fail if a module that is trained as a whole, by ``modules_to_save``, is not in the file as it was trained."""
    known = {base_name(name): tensor for name, tensor in stored.items()}
    for name, tensor in trial.trained.trained.items():
        if "lora_" not in name:
            found = known.get(base_name(name))
            if found is None:
                raise CheckFailed(f"the saved adapter: {base_name(name)} is missing, though it was trained")
            if not torch.equal(found.to(tensor.dtype), tensor):
                raise CheckFailed(f"the saved {base_name(name)} is not the trained one")


@check(
    stage="persistence", needs=(*NEEDS, "save"), incident="unsloth-zoo 806, PEFT 1930: another alpha beside the weights"
)
def check_saved_configuration_gives_the_same_scale(trial: Trial) -> None:
    """The saved ``adapter_config.json`` states the requested rank and scale of every module."""
    file = _saved(trial) / "adapter_config.json"
    if not file.exists():
        raise NotApplicable(f"save wrote no {file.name}")
    asked = trial.lora_spec
    try:
        stored = LoraSpec.of(json.loads(file.read_text("utf-8")))
    except NotSpecified as error:
        raise CheckFailed(f"{file.name} states another kind of adapter than was asked for: {error}") from error
    for module in asked.modules_of(trial.reference.model):
        got = (stored.rank_of(module), stored.scale_of(module))
        expected = (asked.rank_of(module), asked.scale_of(module))
        if got != expected:
            raise CheckFailed(f"{module} is stored with rank {got[0]} and scale {got[1]:.4g}, not {expected[0]} and "
                              f"{expected[1]:.4g}")  # fmt: skip


@check(stage="persistence", needs=(*NEEDS, "save", "load"), incident="PEFT 2118: keys renamed, nothing loaded")
def check_adapter_is_unchanged_by_saving_and_loading(trial: Trial) -> None:
    """After saving and loading onto a fresh base, the adapter gives the same logits."""
    _require_same_logits(
        trial, trial.subject.load(str(trial.base_dir), str(_saved(trial))), "loaded", LOGITS_LIMIT[trial.dtype]
    )


@check(
    stage="persistence",
    needs=(*NEEDS, "save"),
    incident="functionary 289, axolotl 3112: the adapter without its tokenizer",
)
def check_tokenizer_is_saved_with_the_adapter(trial: Trial) -> None:
    """The saved tokenizer gives the same ids as the subject's, and its chat template renders the trained prompts."""
    require_trained_tokenizer(trial, _saved(trial), "beside the adapter")


@check(stage="persistence", needs=(*NEEDS, "save", "merge"), incident="PEFT 2489: no scale; ms-swift 9830: no merge")
def check_merged_model_equals_the_adapted_model(trial: Trial) -> None:
    """In plain transformers, the merged checkpoint has the adapted model's logits, within the rounding of its dtype."""
    from transformers import AutoModelForCausalLM

    merged: Any = AutoModelForCausalLM.from_pretrained(str(_merged(trial)), dtype=torch.float32)
    stored = json.loads((_merged(trial) / "config.json").read_text("utf-8")).get("dtype")
    limit = max(LOGITS_LIMIT[trial.dtype], LOGITS_LIMIT[torch.bfloat16 if stored == "bfloat16" else torch.float32])
    _require_same_logits(trial, merged, "merged", limit, lambda: _merge_cause(trial))


@check(
    stage="persistence",
    needs=(*NEEDS, "save", "merge"),
    incident="PEFT 2306: still wrapped; alpaca-lora 6ced8d9: prefix",
)
def check_merged_checkpoint_has_the_keys_of_the_base(trial: Trial) -> None:
    """The merged checkpoint has exactly the tensor names of the base, and no adapter tensors."""
    base, merged = _keys(trial.base_dir), _keys(_merged(trial))
    left = sorted(name for name in merged if "lora_" in name)
    if left:
        raise CheckFailed(f"{len(left)} adapter tensors are left after the merge, as {left[0]}")
    for words, names in (("is missing from", base - merged), ("is not in the base but in", merged - base)):
        if names:
            raise CheckFailed(f"{min(names)} {words} the merged checkpoint ({len(names)} like it)")


@check(
    stage="persistence",
    needs=(*NEEDS, "save", "merge"),
    incident="zai-org/GLM-4 297: merged and served, it never stops; LLaMA-Factory 5986: another chat template",
)
def check_merged_checkpoint_is_served_as_it_was_trained(trial: Trial) -> None:
    """The merged checkpoint states all stop ids of the base and contains the trained tokenizer and chat template."""
    merged = _merged(trial)
    lost = sorted(stop_ids(trial.base_dir) - stop_ids(merged))
    if lost:
        tokens = " and ".join(trial.subject.tokenizer.convert_ids_to_tokens(lost))
        raise CheckFailed(f"eos_token_id of the merged checkpoint lacks {tokens}: a server does not stop there")
    require_trained_tokenizer(trial, merged, "beside the merged weights")


@check(
    stage="persistence", needs=NEEDS, incident="FastChat 1280: moments lost; accelerate 4071 and 1466: rows; miles 2572"
)
def check_resumed_run_equals_the_uninterrupted_run(trial: Trial) -> None:
    """A run resumed within an epoch or at its end continues with the same rows, learning rates and parameters.

    Random numbers continue too: with dropout the parameters are those of the uninterrupted run.
    """
    common: dict[str, Any] = {"save_every": 1, "schedule": "linear", **trial.noise}
    for changes, whole in trial.offered(RESUMED_PLANS, **common):
        plan = {**common, **changes}
        for number in RESUMED_AT:
            checkpoint = Path(whole.plan["output_dir"]) / f"checkpoint-{number}"
            if not checkpoint.exists():
                raise NotApplicable(
                    f"the trainer was asked to save at every step and left no {checkpoint.name} in output_dir"
                )
            found = describe_divergence(whole, trial.run_anew(**plan, resume_from=str(checkpoint)), number)
            if found and trial.noise:
                found = explain_by_noise(found, _without_noise(trial, plan, number))
            if found:
                told = "".join(f" ({key}={value})" for key, value in changes.items())
                raise CheckFailed(f"resumed after step {number}{told}: {found}")


def _without_noise(trial: Trial, plan: dict[str, Any], number: int) -> str:
    """The divergence of the resumed run where the harness drops nothing: then random numbers are not its cause."""
    quiet = {name: value for name, value in plan.items() if name not in trial.noise}
    whole = trial.run(**quiet)
    checkpoint = Path(whole.plan["output_dir"]) / f"checkpoint-{number}"
    return describe_divergence(whole, trial.run_anew(**quiet, resume_from=str(checkpoint)), number)


def _saved(trial: Trial) -> Path:
    """The folder of the trained adapter, which is saved on first use."""
    if "saved" not in trial.shared:
        folder = trial.new_folder("saved")
        trial.subject.save(trial.trained.model, str(folder))
        trial.shared["saved"] = folder
    return Path(trial.shared["saved"])


def _merged(trial: Trial) -> Path:
    """The folder of the merged checkpoint, which is written on first use."""
    if "merged" not in trial.shared:
        output = trial.folder / "merged"
        trial.subject.merge(str(trial.base_dir), str(_saved(trial)), str(output))
        trial.shared["merged"] = output
    return Path(trial.shared["merged"])


def _merge_cause(trial: Trial) -> str:
    """The mistake that the merged weights show (wrong scale, transposed delta, adapter beside them); "" if none."""
    if list(_merged(trial).glob("adapter_*")):
        return "an adapter lies beside the merged weights and is applied to them twice"
    stored = {
        name: tensor for shard in _merged(trial).glob("*.safetensors") for name, tensor in load_file(shard).items()
    }
    all_deltas = trial.reference.deltas(trial.trained.trained)
    base = {name: held[1].cpu() for name in stored if (held := stored_in(name, trial.reference.weights))}
    deltas = {name: held for name in stored if (held := stored_in(name, all_deltas))}
    foreign = [name for name in base.keys() - deltas.keys() if not _is_near(stored[name].float(), base[name])]
    if foreign:
        return f"it was merged onto another base: {min(foreign)}, which has no adapter, is not the base's"
    if missing := all_deltas.keys() - {parameter for parameter, _ in deltas.values()}:
        return f"the merged checkpoint has no {min(missing)}"
    for name, (_, delta) in deltas.items():
        module = name.removesuffix(".weight")
        if name not in base or stored[name].shape != delta.shape:
            return f"the merged checkpoint has no {name} of the base's shape"
        got = stored[name].float() - base[name]
        factor = float((got * delta).sum() / (delta * delta).sum())
        if not float((got - factor * delta).norm()) <= 1e-2 * float(delta.norm()):
            is_transposed = delta.shape == delta.T.shape and torch.allclose(got, delta.T, atol=1e-5)
            return f"the delta of {module} is " + ("transposed" if is_transposed else "another")
        if abs(factor - 1) > 1e-2:
            return f"the delta of {module} is merged at {factor:.4g} times its scale"
    return ""


def _is_near(stored: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether a tensor is the base's, rounded to bfloat16 at most."""
    return stored.shape == base.shape and torch.allclose(stored, base, rtol=2.0**-7, atol=1e-6)


def _keys(folder: Path) -> set[str]:
    names = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            names |= set(file.keys())
    return names


def _require_same_logits(trial: Trial, model: Any, how: str, limit: float, cause: Callable[[], str] = str) -> None:
    ids = torch.tensor([list(trial.rows(trial.demo)[0][0])])
    base = trial.reference
    with torch.no_grad():
        expected, got = (
            m.eval()(input_ids=ids.to(m.device)).logits.float().cpu()[0] for m in (trial.trained.model, model)
        )
        untrained = base.logits(base.hidden(ids[0].tolist(), {}), {})
    size = float((got - expected).norm() / expected.norm())
    kind = f"{how} model" + ", bf16" * (limit > LOGITS_LIMIT[torch.float32])
    if not within(f"persistence: logits of the {kind}", size, limit):
        is_base = float((got - untrained).norm() / untrained.norm()) <= limit
        raise CheckFailed(
            f"the {how} model's logits are {size:.1e} off the trained one's"
            + (": they are the base's" if is_base else f"; likely cause: {found}" if (found := cause()) else "")
        )
