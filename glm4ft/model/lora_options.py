"""The options of a LoRA adapter, and what peft makes of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from glm4ft.errors import ConfigError

if TYPE_CHECKING:  # the command line reads LoraOptions to print its help, and should not wait for torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

# All linear layers of a dense decoder layer; gate and up projection are one fused module in Glm and Glm4.
GLM4_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The linear layers of attention, and those of MLA (GLM-4.7-Flash), of which a model has some
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
# The weights of all routed experts of a layer, fused to one parameter of three dimensions each
EXPERT_TARGETS = ("experts.gate_up_proj", "experts.down_proj")

# peft's names for fields that have an option of their own here, and the reasons why other fields may not be set
_OWN_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
_FIXED = {"task_type": "it is CAUSAL_LM", "peft_type": "it is LORA", "inference_mode": "it would train nothing"}


@dataclass(frozen=True)
class LoraOptions:
    """The configuration of the LoRA adapter.

    Args:
        rank: The inner dimension of A and B.
        alpha: The numerator of the scale alpha / rank of the adapter's branch; twice the rank is the common choice, and
            the one that the default learning rates assume.
        dropout: The dropout probability on the input of the adapter's branch during training.
        targets: The names of the modules to adapt; each has to match at least one module. A name that begins with
            ``experts.`` is that of a fused parameter. By default the linear layers of each decoder layer; of a model
            with experts those of attention, and the routed experts.
        options: Further fields of ``peft.LoraConfig``, by peft's names (``use_rslora``, ``modules_to_save``, ...).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(isinstance(self.rank, int) and self.rank >= 1, "rank", self.rank, "a whole number, at least 1")
        _require(0 < self.alpha < float("inf"), "alpha", self.alpha, "more than 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")
        if self.targets is not None:
            are_names = isinstance(self.targets, Sequence) and not isinstance(self.targets, str) and all(self.targets)
            _require(are_names and len(self.targets) > 0, "targets", self.targets, "a list of module names")
        if self.options:
            _require_peft_fields(self.options)
            _require_unchanged_base(self.options.get("init_lora_weights", True))
            self.peft_config()

    @property
    def named(self) -> list[str]:
        """The names of the targets; a dense GLM-4 model's, if none are given."""
        return list(GLM4_TARGETS if self.targets is None else self.targets)

    def for_model(self, model: PreTrainedModel | PeftModel) -> LoraOptions:
        """The options with the default targets of a model filled in.

        Args:
            model: The base, with or without adapters.
        """
        if self.targets is not None:
            return self
        leaves = {name.removesuffix(".base_layer").rpartition(".")[2] for name, _ in model.named_modules()}
        if has_experts(model):
            targets = [*(name for name in ATTENTION_TARGETS if name in leaves), *EXPERT_TARGETS]
        else:
            targets = list(GLM4_TARGETS if "gate_up_proj" in leaves else LLAMA_TARGETS)
        return replace(self, targets=targets)

    def peft_config(self) -> LoraConfig:
        """Convert the options to peft's configuration.

        Raises:
            ConfigError: If peft refuses a value.
        """
        from peft import LoraConfig

        try:
            # peft types lora_alpha as int, but only ever divides it
            own: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
            fused = [target for target in self.named if target.startswith("experts.")]
            if fused:
                own["target_parameters"] = [f"mlp.{target}" for target in fused]
            modules = [target for target in self.named if target not in fused]
            return LoraConfig(task_type="CAUSAL_LM", target_modules=modules, **own, **self.options)
        except (TypeError, ValueError, ImportError) as error:
            raise refused_by_peft(self.options, error) from error


def has_experts(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model has routed experts, as GLM-4.5 and newer."""
    return getattr(model.config, "num_local_experts", None) is not None


def refused_by_peft(options: Mapping[str, Any], error: Exception) -> ConfigError:
    """The error for options that peft does not take.

    Args:
        options: The further fields of ``peft.LoraConfig``.
        error: What peft raised.
    """
    found = " ".join(str(error).split())
    return ConfigError("peft refuses the adapter", where=f"--lora.options {dict(options)}", found=found)


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
    """Refuse initialisations that move a part of the base into the adapter, which then needs the changed base."""
    if init not in INITIALISATIONS:
        raise ConfigError(
            "this initialisation changes the base, which is not saved with the adapter",
            where="--lora.options.init_lora_weights",
            found=repr(init),
            expected=", ".join(map(repr, INITIALISATIONS)),
        )
