"""Attach LoRA adapters to a base, and report the trained parameters.

peft adapts every module that matches one of the targets and does not report a target without a match, so a run can
train half of the targets in its configuration. Here every target has to match, and the report counts its modules.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm4ft.errors import ConfigError
from glm4ft.model.lora_options import EXPERT_TARGETS, LoraOptions, has_experts, refused_by_peft

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

# In a model with experts, peft (0.21) takes these names of old checkpoints for those of the fused experts
_TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate")


@dataclass(frozen=True)
class AdapterReport:
    """The adapted modules and trained parameters of a model.

    Args:
        num_adapted: A mapping of target to its number of adapted modules.
        trained: The names of the trained parameters.
        num_trained: The number of entries of the trained parameters.
        num_total: The number of entries of all parameters, adapters included.
        warnings: Sentences about settings that are allowed but probably unintended.
        has_experts: Whether the model has routed experts.
    """

    num_adapted: Mapping[str, int]
    trained: tuple[str, ...]
    num_trained: int
    num_total: int
    warnings: tuple[str, ...]
    has_experts: bool = False

    @property
    def share(self) -> float:
        """The share of trained entries among all entries, from 0 to 1."""
        return self.num_trained / self.num_total

    def describe(self) -> str:
        """Format the report on one line."""
        adapters, targets = sum(self.num_adapted.values()), len(self.num_adapted)
        return (
            f"{adapters} adapter{'s' * (adapters != 1)} on {targets} target{'s' * (targets != 1)}, "
            f"{self.num_trained:,} trained of {self.num_total:,} parameters ({100 * self.share:.3g} %)"
            + f" on {', '.join(self.num_adapted)}; routers are frozen, no auxiliary loss is added"
            * self.has_experts
        )


def attach_lora(model: PreTrainedModel, options: LoraOptions, *, seed: int) -> PeftModel:
    """Wrap a base with fresh adapters, which do not change its output yet.

    Args:
        model: The base, changed in place; its train or eval mode is kept.
        options: The configuration of the adapter.
        seed: The seed of the adapters' weights, which depend on it alone; torch's own generators are unchanged.

    Returns:
        The wrapped model: base frozen, adapters trainable and in fp32 whatever the dtype of the base.

    Raises:
        ConfigError: If a target matches no module that can be adapted (the model is then unchanged), or peft refuses
            an option.
    """
    import torch
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError("the model has adapters already", found=type(model).__name__, fix="load the base anew")
    options = options.for_model(model)
    if has_experts(model):
        _require_unambiguous(model, options)
    config, was_training = options.peft_config(), model.training
    _require_targets(model, config, options)
    _require_modules(model, options)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # FutureWarnings are about peft's own calls of transformers; warnings about the options pass
        warnings.simplefilter("ignore", FutureWarning)
        torch.default_generator.manual_seed(seed)
        for device in devices:  # not torch.manual_seed: it would reseed devices that were not forked
            torch.cuda.default_generators[device].manual_seed(seed)
        try:
            adapted: Any = get_peft_model(model, config)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise refused_by_peft(options.options, error) from error
    trained: PeftModel = adapted.train(was_training)
    return trained


def audit_lora(model: PeftModel, options: LoraOptions) -> AdapterReport:
    """Report the adapters that a model actually has.

    Args:
        model: A model with adapters, made by ``attach_lora`` or peft.
        options: The requested configuration.

    Returns:
        The report.

    Raises:
        ConfigError: If a target has no adapter, or no parameter is trained.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    options = options.for_model(model)
    adapted = [adapted_name(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    num_adapted = {target: sum(_matches(name, target) for name in adapted) for target in options.named}
    _require_all_match(num_adapted, options, model)
    if unasked := [name for name in adapted if not any(_matches(name, target) for target in options.named)]:
        raise ConfigError("a module has an adapter that was not asked for", where="--lora.targets", found=unasked[0])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError("no parameter is trained", where="--lora", fix="attach the adapter with attach_lora")
    doubts = []
    if coarse := [name for name, p in trained.items() if p.dtype != torch.float32]:
        doubts.append(
            f"{len(coarse)} trained parameters are in {trained[coarse[0]].dtype}, {coarse[0]} the first: updates of "
            "less than about 1/256 of a weight are rounded away; train them on an fp32 base"
        )
    num_trained, num_total = model.get_nb_trainable_parameters()  # of a quantised weight, two entries share a byte
    if routers := [name for name in trained if _is_router(name)]:
        raise ConfigError("a router is trained, but it has to stay frozen", where="--lora", found=routers[0])
    return AdapterReport(num_adapted, tuple(trained), num_trained, num_total, tuple(doubts), has_experts(model))


def adapted_name(name: str, module: Any) -> str:
    """The name of what a layer of peft adapts: a module, or a parameter of a module that it wraps once for each.

    Args:
        name: The name of peft's layer.
        module: The layer.
    """
    parameter = getattr(module, "parameter_name", None)
    return f"{name.removesuffix('.base_layer')}.{parameter}" if parameter else name


def _is_router(name: str) -> bool:
    return ".mlp.gate." in name


def _require_unambiguous(model: PreTrainedModel, options: LoraOptions) -> None:
    for target in options.named:
        if target.rpartition(".")[2] in _TAKEN_FOR_EXPERTS and target not in EXPERT_TARGETS:
            raise ConfigError(
                "in a model with experts peft takes this name for that of the fused experts or the router",
                where="--lora.targets",
                found=target,
                expected=", ".join(LoraOptions().for_model(model).named),
                fix="name experts.gate_up_proj and experts.down_proj; dense and shared MLPs stay frozen",
            )
    for pattern in options.options.get("modules_to_save") or ():
        if any(_is_router(f"{name}.") for name, _ in model.named_modules() if _matches(name, pattern)):
            raise ConfigError(
                "the router has to stay frozen", where="--lora.options.modules_to_save", found=str(pattern)
            )


def _require_modules(model: PreTrainedModel, options: LoraOptions) -> None:
    """Refuse names without a match in peft's other options that name modules; peft does not report them either."""
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern"):
        for pattern in options.options.get(key) or ():
            if not any(re.search(rf"(^|\.)({pattern})$", name) for name, _ in model.named_modules()):
                raise ConfigError("the name matches no module", where=f"--lora.options.{key}", found=str(pattern))


def _matches(module_name: str, target: str) -> bool:
    """Apply peft's rule for a list of targets: the whole name matches, or its end after a dot."""
    return module_name == target or module_name.endswith(f".{target}")


def _require_targets(model: PreTrainedModel, config: LoraConfig, options: LoraOptions) -> None:
    """Require that every target matches a module, by peft's own rules for layers and exclusions."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from torch import nn

    chosen = {name: m for name, m in model.named_modules() if check_target_module_exists(config, name)}
    for name, module in chosen.items():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            raise ConfigError(
                "a target is not a linear layer, so LoRA cannot adapt it",
                where="--lora.targets",
                found=f"{name}, a {type(module).__name__}",
                expected=_available(model),
            )
    fused = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    num_chosen = {target: sum(_matches(name, target) for name in [*chosen, *fused]) for target in options.named}
    _require_all_match(num_chosen, options, model)


def _require_all_match(num_matches: Mapping[str, int], options: LoraOptions, model: Any) -> None:
    unmatched = [target for target, number in num_matches.items() if not number]
    if not unmatched:
        return
    available = _available(model)
    is_split = {"gate_proj", "up_proj"} & set(unmatched) and "gate_up_proj" in available
    narrowed = [
        name for name in options.options if name in ("layers_to_transform", "layers_pattern", "exclude_modules")
    ]
    raise ConfigError(
        "a target matches no module, so it would not be trained",
        where="--lora.targets",
        found=", ".join(unmatched),
        expected=f"among {available}" + f", as restricted by {' and '.join(narrowed)}" * bool(narrowed),
        fix="GLM-4 has gate_proj and up_proj fused: name gate_up_proj instead" if is_split else "",
    )


def _available(model: Any) -> str:
    """List the last name components of all linear layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    linear = [
        name for name, m in model.named_modules() if isinstance(m, (nn.Linear, BaseTunerLayer)) and "lora_" not in name
    ]
    return ", ".join(sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in linear}))
