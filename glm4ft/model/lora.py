"""Attach LoRA adapters to a base, and account for what is trained.

peft adapts whatever matches one of the targets and says nothing of a target that matches nothing, so a run can train
half of what its configuration lists. Here every target has to match, and the account counts the modules of each.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from glm4ft.errors import ConfigError

if TYPE_CHECKING:  # the command line reads LoraOptions to print its help, and should not wait for torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

# All linear layers of a decoder layer; gate and up projection are one fused module in Glm and Glm4.
GLM4_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")

# peft's names for what has an option of its own here, and why others may not be set
_OWN_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
_FIXED = {"task_type": "it is CAUSAL_LM", "peft_type": "it is LORA", "inference_mode": "it would train nothing"}


@dataclass(frozen=True)
class LoraOptions:
    """The adapter.

    Args:
        rank: inner dimension of A and B.
        alpha: the adapter's branch is multiplied by alpha / rank; twice the rank is the common choice, and the one
            that the default learning rates go with.
        dropout: on the input of the adapter's branch, while training.
        targets: names of the modules to adapt; each has to match at least one.
        options: further fields of ``peft.LoraConfig``, by peft's names (``use_rslora``, ``modules_to_save``, ...).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(GLM4_TARGETS))
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(isinstance(self.rank, int) and self.rank >= 1, "rank", self.rank, "a whole number, at least 1")
        _require(0 < self.alpha < float("inf"), "alpha", self.alpha, "more than 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")
        are_names = isinstance(self.targets, Sequence) and not isinstance(self.targets, str) and all(self.targets)
        _require(are_names and len(self.targets) > 0, "targets", self.targets, "a list of module names")
        if self.options:
            _require_peft_fields(self.options)
            _require_unchanged_base(self.options.get("init_lora_weights", True))
            self.peft_config()

    def peft_config(self) -> LoraConfig:
        """The same in peft's words.

        Raises:
            ConfigError: if peft refuses a value.
        """
        from peft import LoraConfig

        try:
            # peft types lora_alpha as int, but only ever divides it
            own: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
            return LoraConfig(task_type="CAUSAL_LM", target_modules=list(self.targets), **own, **self.options)
        except (TypeError, ValueError, ImportError) as error:
            raise _refused_by_peft(self.options, error) from error


@dataclass(frozen=True)
class AdapterReport:
    """What is trained.

    Args:
        num_adapted: target to the number of modules adapted by it.
        trained: names of the trained parameters.
        num_trained: their entries.
        num_total: entries of all parameters, adapters included.
        warnings: what is allowed but probably not meant, one sentence each.
    """

    num_adapted: Mapping[str, int]
    trained: tuple[str, ...]
    num_trained: int
    num_total: int
    warnings: tuple[str, ...]

    @property
    def share(self) -> float:
        """Trained entries among all."""
        return self.num_trained / self.num_total

    def describe(self) -> str:
        """The account on one line."""
        adapters, targets = sum(self.num_adapted.values()), len(self.num_adapted)
        return (
            f"{adapters} adapter{'s' * (adapters != 1)} on {targets} target{'s' * (targets != 1)}, "
            f"{self.num_trained:,} trained of {self.num_total:,} parameters ({100 * self.share:.3g} %)"
        )


def attach_lora(model: PreTrainedModel, options: LoraOptions, *, seed: int) -> PeftModel:
    """Wrap a base with adapters that do nothing yet.

    Args:
        model: is changed in place; whether it is in train or eval mode is kept.
        options: the adapter.
        seed: of the adapters' weights, which depend on it alone; torch's own generators are left as they were.

    Returns:
        The wrapped model: base frozen, adapters trainable and in fp32 whatever the dtype of the base.

    Raises:
        ConfigError: if a target matches nothing that can be adapted (the model is then untouched), or peft refuses
            an option.
    """
    import torch
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError("the model has adapters already", found=type(model).__name__, fix="load the base anew")
    config, was_training = options.peft_config(), model.training
    _require_targets(model, config, options)
    _require_modules(model, options)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # what peft still calls in transformers is between the two; warnings about the options pass
        warnings.simplefilter("ignore", FutureWarning)
        torch.default_generator.manual_seed(seed)
        for device in devices:  # not torch.manual_seed: it would reseed devices that were not forked
            torch.cuda.default_generators[device].manual_seed(seed)
        try:
            adapted: Any = get_peft_model(model, config)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise _refused_by_peft(options.options, error) from error
    trained: PeftModel = adapted.train(was_training)
    return trained


def audit_lora(model: PeftModel, options: LoraOptions) -> AdapterReport:
    """Account for the adapters a model really has.

    Args:
        model: as ``attach_lora`` or peft made it.
        options: what was asked for.

    Returns:
        The account.

    Raises:
        ConfigError: if a target has no adapter, or nothing is trained.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    num_adapted = {target: sum(_matches(name, target) for name in adapted) for target in options.targets}
    _require_all_match(num_adapted, options, model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError("no parameter is trained", where="--lora", fix="attach the adapter with attach_lora")
    doubts = []
    if coarse := [name for name, p in trained.items() if p.dtype != torch.float32]:
        doubts.append(
            f"{len(coarse)} trained parameters are in {trained[coarse[0]].dtype}, {coarse[0]} the first: updates of "
            "less than about 1/256 of a weight are rounded away; train them on an fp32 base"
        )
    num_trained, num_total = sum(p.numel() for p in trained.values()), sum(p.numel() for p in model.parameters())
    return AdapterReport(num_adapted, tuple(trained), num_trained, num_total, tuple(doubts))


def _require(is_legal: bool, name: str, value: object, expected: str) -> None:
    if not is_legal:
        raise ConfigError("option out of range", where=f"--lora.{name}", found=repr(value), expected=expected)


def _require_peft_fields(options: Mapping[str, Any]) -> None:
    from peft import LoraConfig

    legal = {f.name for f in fields(LoraConfig) if f.init}
    for name in options:
        where = f"--lora.options.{name}"
        if name in _OWN_NAMES:
            raise ConfigError("this has an option of its own", where=where, expected=f"--lora.{_OWN_NAMES[name]}")
        if name in _FIXED:
            raise ConfigError("this cannot be set", where=where, found=repr(options[name]), fix=_FIXED[name])
        if name not in legal:
            near = difflib.get_close_matches(name, legal, n=1, cutoff=0.5)
            raise ConfigError("peft.LoraConfig has no such field", where=where, expected=near[0] if near else "")


def _require_unchanged_base(init: object) -> None:
    """Some initialisations move a part of the base into the adapter, which is then right on the changed base alone."""
    if init not in INITIALISATIONS:
        raise ConfigError(
            "this initialisation changes the base, which is not saved with the adapter",
            where="--lora.options.init_lora_weights",
            found=repr(init),
            expected=", ".join(map(repr, INITIALISATIONS)),
        )


def _require_modules(model: PreTrainedModel, options: LoraOptions) -> None:
    """Further options of peft's that name modules, and say nothing either of a name that matches none."""
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern"):
        for pattern in options.options.get(key) or ():
            if not any(re.search(rf"(^|\.)({pattern})$", name) for name, _ in model.named_modules()):
                raise ConfigError("the name matches no module", where=f"--lora.options.{key}", found=str(pattern))


def _refused_by_peft(options: Mapping[str, Any], error: Exception) -> ConfigError:
    found = " ".join(str(error).split())
    return ConfigError("peft refuses the adapter", where=f"--lora.options {dict(options)}", found=found)


def _matches(module_name: str, target: str) -> bool:
    """Peft's rule for a list of targets: the whole name, or its end from a dot on."""
    return module_name == target or module_name.endswith(f".{target}")


def _require_targets(model: PreTrainedModel, config: LoraConfig, options: LoraOptions) -> None:
    """Before anything is wrapped: every target matches, with peft's own say on layers and exclusions."""
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
    num_chosen = {target: sum(_matches(name, target) for name in chosen) for target in options.targets}
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
        expected=f"among {available}" + f", in what {' and '.join(narrowed)} leave" * bool(narrowed),
        fix="GLM-4 has gate_proj and up_proj fused: name gate_up_proj instead" if is_split else "",
    )


def _available(model: Any) -> str:
    """The last names of all linear layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    linear = [
        name for name, m in model.named_modules() if isinstance(m, (nn.Linear, BaseTunerLayer)) and "lora_" not in name
    ]
    return ", ".join(sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in linear}))
