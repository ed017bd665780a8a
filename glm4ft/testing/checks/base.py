"""Claims about the model before its first step: without its adapters it is the base on the disk."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from glm4ft.testing.replay.tolerances import LIMITS, within
from glm4ft.testing.specification.lora_spec import LoraSpec, base_name
from glm4ft.testing.specification.reference import Reference
from glm4ft.testing.specification.routed_experts import stored_in
from glm4ft.testing.trial.first_module import describe_first_differing_module
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

# Fields of a configuration that state how the model was loaded, not what it computes.
NOT_ARITHMETIC = (
    "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "_name_or_path", "name_or_path",
    "_attn_implementation", "auto_map",
)  # fmt: skip


@check(stage="model", needs=("build_model",), incident="torchtune 997 and 409: another rope base, another norm epsilon")
def check_configuration_equals_that_of_the_base(trial: Trial) -> None:
    """Every configuration field that affects what the model computes has the value in the base's ``config.json``."""
    stored = json.loads((trial.base_dir / "config.json").read_text("utf-8"))
    config = built(trial).config.to_dict()
    for name, expected in stored.items():
        got = json.loads(json.dumps(config.get(name, expected)))
        if name not in NOT_ARITHMETIC and got != expected:
            raise CheckFailed(f"{name} is {got} in the model, {expected} in the base's config.json")


@check(stage="model", needs=("build_model",), incident="unsloth-zoo 913: a square weight was transposed on load")
def check_weights_equal_those_of_the_base(trial: Trial) -> None:
    """Before training, every tensor of the base folder is in the model, bit by bit."""
    weights = {base_name(name): tensor for name, tensor in built(trial).state_dict().items() if "lora_" not in name}
    for shard in sorted(trial.base_dir.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                found = stored_in(name, weights)
                if found is None:
                    raise CheckFailed(f"the model has no {name}")
                got, stored = found[1].cpu(), file.get_tensor(name).to(found[1].dtype)
                if not torch.equal(got, stored):
                    raise CheckFailed(f"{name} is not the base's{_weight_cause(got, stored)}")


def _weight_cause(got: torch.Tensor, stored: torch.Tensor) -> str:
    if got.dim() == 2 and torch.equal(got.T, stored):
        return ": it is transposed"
    if torch.equal(got, stored.bfloat16().to(got.dtype)):
        return ": it is rounded to bfloat16"
    a, b = got.double().flatten(), stored.double().flatten()
    cosine = float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300)) if a.shape == b.shape else 1.0
    # of random vectors of n entries it is about n ** -0.5
    return f": it was drawn anew (cosine {cosine:.2g})" if abs(cosine) < 8 * len(a) ** -0.5 else ""


@check(
    stage="model", needs=("build_model",), incident="axolotl 1886, unsloth-zoo 913: another norm, a weight transposed"
)
def check_first_loss_equals_that_of_the_base(trial: Trial) -> None:
    """Before training, the model has the logits of the base without adapters, and therefore its loss."""
    model, base = built(trial).eval(), _plain_base(trial)
    ids, labels = trial.rows(trial.conversations)[0]
    expected_TV, got_TV = base.logits(base.hidden(ids, {}), {}), logits_of(model, ids)
    size = float((got_TV - expected_TV).norm() / expected_TV.norm())
    if not within("model: first logits", size, LIMITS[trial.dtype]):
        wanted = torch.tensor(labels[1:])
        first, own = (float(torch.nn.functional.cross_entropy(x[:-1], wanted)) for x in (got_TV, expected_TV))
        where = describe_first_differing_module(model, base.model, ids, LIMITS[trial.dtype])
        raise CheckFailed(
            f"the first loss is {first:.6f}, the base's {own:.6f}; the logits are {size:.1e} off"
            + (f"; {where}" if where else "")
        )


def _plain_base(trial: Trial) -> Reference:
    """The specification of the base, for any kind of adapter: before training none of them changes the output."""
    try:
        return trial.reference
    except NotApplicable:
        return Reference(trial.base_dir, LoraSpec(rank=1, alpha=1))


@check(stage="model", needs=("build_model",), incident="torchtune 1909 and 2139: magnitudes in empty memory")
def check_all_parameters_are_finite(trial: Trial) -> None:
    """No weight and no buffer contains NaN or infinity."""
    for name, tensor in built(trial).state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckFailed(f"{name} has {int((~torch.isfinite(tensor)).sum())} entries that are not finite")


@check(
    stage="model", needs=("build_model",), incident="axolotl 787, qlora 190d22a: new tokens, neither trained nor saved"
)
def check_every_id_is_in_the_vocabulary_of_the_base(trial: Trial) -> None:
    """Every token id in the data is in the base's vocabulary, or its embedding row is trained."""
    rows = trial.rows(trial.conversations) + trial.rows(trial.demo)
    largest, model = max(max(ids) for ids, _ in rows), built(trial)
    num_known = len(AutoTokenizer.from_pretrained(trial.base_dir))  # later rows only pad the matrix
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "embed_tokens" in name]
    if largest >= num_known and not trained:
        raise CheckFailed(
            f"id {largest} is none of the {num_known} of the base's tokenizer: a new token, whose embedding row is not "
            "trained"
        )


def built(trial: Trial) -> Any:
    """The model that the subject trains, before its first step."""
    return trial.subject.build_model(str(trial.base_dir), 0)


def logits_of(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """The logits (T, V) of a model on one row, in float32 on the CPU."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device))
    logits_TV: torch.Tensor = output.logits[0].float().cpu()
    return logits_TV
