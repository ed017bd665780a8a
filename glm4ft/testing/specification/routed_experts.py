"""The layers with routed experts in plain torch: which experts a token is given, and what they compute.

Nothing is taken from the run under test: the router of the base, which is frozen, decides here by its own arithmetic.
A choice is a jump, so two right computations can differ where two scores are equal but for rounding. In four runs on
each tiny base none of 13,000 tokens came nearer to that than 8.6e-6, while scores agree to about 1e-7 (fp32, x86-64
CPU, 2026-11-27). In bf16 some tokens will come near enough; the model's stage then departs at those rows.

Shapes: T tokens, D hidden, E experts, I the width of an expert.
Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (sigmoid scores, a bias for the choice alone, groups), whose
router GLM-4.5 has, arXiv 2508.06471, section 2.1.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from glm4ft.errors import ModelError

# Before these, transformers chose experts by other arithmetic, and peft gave their fused adapters other shapes.
NEEDED = {"transformers": "5.14", "peft": "0.19.1"}
_NUMBER_OF_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")  # in the configurations of transformers
BLOCKS = ("Glm4MoeMoE", "Glm4MoeLiteMoE")  # transformers' names of these layers
_STORED = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")


def has_experts(base_dir: Path) -> bool:
    """Whether a base has layers with routed experts, by its ``config.json``; False where there is none."""
    file = base_dir / "config.json"
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return any(config.get(name) for name in _NUMBER_OF_EXPERTS)


def too_old(found: Mapping[str, str] | None = None) -> dict[str, str]:
    """The libraries in versions that this specification is not about.

    Args:
        found: The version of each library; by default the installed ones. A library that it lacks is not judged.
    Returns:
        The name and version of each; empty if all are recent enough.
    """
    known = {name: version(name) for name in NEEDED} if found is None else found
    return {name: known[name] for name, least in NEEDED.items() if name in known and _key(known[name]) < _key(least)}


def require_recent_libraries(base_dir: Path, found: Mapping[str, str] | None = None, *, by: str = "installed") -> None:
    """Refuse to judge a model with experts that libraries of other arithmetic or shapes of adapters computed.

    Args:
        base_dir: The model folder of the base.
        found: The version of each library, as for ``too_old``.
        by: Where the versions come from, for the message.
    Raises:
        ModelError: If the base has experts and a library is too old.
    """
    if has_experts(base_dir) and (old := too_old(found)):
        least = [f"{name}>={NEEDED[name]}" for name in NEEDED]
        raise ModelError(
            "a model with experts cannot be judged: before these versions its experts or their adapters were computed "
            "otherwise than the specification does", where=str(base_dir),
            found=f"{', '.join(f'{name} {number}' for name, number in old.items())} ({by})", expected=", ".join(least),
            fix=f"pip install {' '.join(repr(one) for one in least)}" + ", and record the run again" * bool(found),
        )  # fmt: skip


def _key(number: str) -> tuple[int, ...]:
    """A version as numbers that can be compared; what follows them (a build, a development version) does not count."""
    numbers = re.match(r"\d+(\.\d+)*", number)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def specify_experts(model: torch.nn.Module) -> None:
    """Replace the arithmetic of every layer with routed experts by that of this module, in place.

    Args:
        model: The base; its parameters stay where they are.
    """
    for block in model.modules():
        if type(block).__name__ in BLOCKS:
            block.forward = functools.partial(experts_output, block)


def experts_output(block: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """The output of a layer: each token's chosen experts, weighted, and the expert that all tokens share."""
    hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    scores_TE = torch.sigmoid(hidden_TD @ block.gate.weight.T)
    weights_TE = expert_weights(scores_TE, block.gate.e_score_correction_bias, block.config)
    output_TD = _gated(
        hidden_TD, block.shared_experts.gate_proj.weight, block.shared_experts.up_proj.weight,
        block.shared_experts.down_proj.weight,
    )  # fmt: skip
    experts = zip(block.experts.gate_up_proj, block.experts.down_proj, weights_TE.T, strict=True)
    for gate_up_ID, down_DI, weight_T in experts:
        own = weight_T.nonzero()[:, 0]
        gate_ID, up_ID = gate_up_ID.chunk(2)
        added = weight_T[own, None] * _gated(hidden_TD[own], gate_ID, up_ID, down_DI)
        output_TD = output_TD.index_add(0, own, added)
    return output_TD.reshape(hidden_BTD.shape)


def expert_weights(scores_TE: torch.Tensor, bias_E: torch.Tensor, config: Any) -> torch.Tensor:
    """The weight of each expert for each token, 0 for those that it is not given.

    Args:
        scores_TE: The router's scores, between 0 and 1.
        bias_E: What is added to the scores for the choice alone.
        config: The configuration of the base.
    """
    chosen_TE = chosen_experts((scores_TE + bias_E).detach(), config)
    weights_TE = scores_TE * chosen_TE
    if config.norm_topk_prob:
        weights_TE = weights_TE / weights_TE.sum(1, keepdim=True)
    return weights_TE * float(config.routed_scaling_factor)


def chosen_experts(preference_TE: torch.Tensor, config: Any) -> torch.Tensor:
    """Whether each token is given each expert: the best of the groups whose two best experts are best together.

    Args:
        preference_TE: Scores with their bias.
        config: The configuration of the base.
    """
    groups_TGE = preference_TE.unflatten(1, (config.n_group, -1))
    if config.n_group > 1:
        best_TG = groups_TGE.sort(dim=2, descending=True).values[:, :, :2].sum(2)
        groups_TGE = groups_TGE.masked_fill(~_largest(best_TG, config.topk_group)[:, :, None], -torch.inf)
    return _largest(groups_TGE.flatten(1), config.num_experts_per_tok)


def stored_in(name: str, weights: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor] | None:
    """The weight of a model that a checkpoint's file has under a name, and the parameter that it is a part of.

    The files have the matrices of each expert on their own, and transformers fuses them when it loads them.

    Args:
        name: The name in the file.
        weights: The weights of a model by name.
    Returns:
        The name of the parameter and the part of it; None if there is none.
    """
    found = _STORED.fullmatch(name)
    if name in weights or not found:
        return (name, weights[name]) if name in weights else None
    fused = f"{found['experts']}.{'down_proj' if found['part'] == 'down' else 'gate_up_proj'}"
    if fused not in weights or int(found["number"]) >= len(weights[fused]):
        return None
    own = weights[fused][int(found["number"])]
    return fused, own if found["part"] == "down" else own.chunk(2)[found["part"] == "up"]


def fused_name(module: str, matrices: Mapping[str, torch.Size], weights: Mapping[str, torch.Tensor]) -> str:
    """The name of the parameter of three dimensions that a pair of LoRA matrices adapts; "" if there is none.

    peft wraps a module once for each adapted parameter, so that names do not tell them apart, but shapes do.

    Args:
        module: The name of the module that has the parameter.
        matrices: The shapes of the matrices, by ``A`` and ``B``.
        weights: The weights of the base by name.
    """
    for name, weight in weights.items():
        if weight.dim() == 3 and name.rpartition(".")[0] == module:
            ends = {"A": matrices.get("A", weight.shape)[-1], "B": matrices.get("B", weight.shape[1:])[0]}
            if (ends["B"], ends["A"]) == tuple(weight.shape[1:]):
                return name
    return ""


def fused_delta(a: torch.Tensor, b: torch.Tensor, num_experts: int) -> torch.Tensor:
    """What a pair of LoRA matrices adds to a fused parameter (E, out, in), but for the scale: ``B_e A_e`` each.

    Args:
        a: The matrices A below one another, those of an expert in consecutive rows.
        b: The matrices B beside one another, of each column of all experts in turn.
        num_experts: The number of experts.
    Source: huggingface/peft, ``lora.ParamWrapper``, which decides the order of rows and columns.
    """
    each_a = a.unflatten(0, (num_experts, -1))
    each_b = [b[:, expert::num_experts] for expert in range(num_experts)]
    return torch.stack([left @ right for left, right in zip(each_b, each_a, strict=True)])


def _gated(hidden_TD: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (F.silu(hidden_TD @ gate.T) * (hidden_TD @ up.T)) @ down.T


def _largest(values: torch.Tensor, number: int) -> torch.Tensor:
    """Whether each entry is among the largest of its row."""
    order = values.argsort(dim=1, descending=True)[:, :number]
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order, True)
