"""Specifies the requested LoRA adapter: its modules, ranks and scales; independent of any adapter library."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# Options of peft that make another kind of adapter than this module specifies.
UNKNOWN_KINDS = (
    "alora_invocation_tokens", "arrow_config", "layer_replication", "lora_bias", "trainable_token_indices",
    "use_bdlora", "use_qalora", "velora_config", "kasa_config", "monteclora_config",
)  # fmt: skip
ACTS_ON_NOTHING = (True, "gaussian", "orthogonal", "eva")  # values of init_lora_weights with which B A is zero at first
_LAYER = re.compile(r"\.(?:layers|h|blocks?)\.(\d+)\.")


class NotSpecified(ValueError):
    """A trained parameter, or the adapter that was asked for, is of a kind that the specification does not cover."""


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA configuration with the meaning of peft's options.

    Args:
        rank: The inner dimension of A and B.
        alpha: The numerator of the scale.
        targets: Endings of module names, or one regular expression for whole names; ``all-linear`` is every linear
            layer but the head.
        parameters: Endings of the names of parameters of three dimensions, the fused weights of experts.
        rank_pattern: The rank of modules whose name matches a pattern, by pattern; ``rank`` applies to all others.
        alpha_pattern: The alpha of modules whose name matches a pattern, by pattern; ``alpha`` applies to all others.
        rank_stabilised: Whether the scale is divided by the square root of the rank (rsLoRA) and not by the rank.
        layers: The numbers of the layers to adapt; None for all.
        excluded: Endings of the names of modules to leave out, or one regular expression for whole names.
        decomposed: Whether each adapted weight has a trained magnitude beside its direction (DoRA).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str = "all-linear"
    parameters: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    layers: tuple[int, ...] | None = None
    excluded: tuple[str, ...] | str = ()
    decomposed: bool = False

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> LoraSpec:
        """Make the specification from options with peft's names.

        Raises:
            NotSpecified: If an option asks for a kind of adapter that this specification does not cover.
        """
        for option in UNKNOWN_KINDS:
            if asked.get(option):
                raise NotSpecified(f"{option} is not covered by the reference")
        if (init := asked.get("init_lora_weights", True)) not in ACTS_ON_NOTHING:
            raise NotSpecified(
                f"init_lora_weights={init!r} is not covered by the reference: its adapters act at the start"
            )
        targets, layers = asked.get("target_modules") or "all-linear", asked.get("layers_to_transform")
        return cls(
            rank=asked.get("r", 8),
            alpha=asked.get("lora_alpha", 8),
            targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
            parameters=tuple(sorted(asked.get("target_parameters") or ())),
            rank_pattern=asked.get("rank_pattern") or {},
            alpha_pattern=asked.get("alpha_pattern") or {},
            rank_stabilised=bool(asked.get("use_rslora")),
            layers=None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
            excluded=asked.get("exclude_modules") or (),
            decomposed=bool(asked.get("use_dora")),
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return next((rank for key, rank in self.rank_pattern.items() if _matches(key, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's adapter, looked up independently of which rank pattern matches."""
        return next((alpha for key, alpha in self.alpha_pattern.items() if _matches(key, module)), self.alpha)

    def scale_of(self, module: str) -> float:
        """The scale of a module's adapter: the factor on ``B A``.

        Source: LoRA, arXiv 2106.09685, section 4.1: alpha / r; rsLoRA, arXiv 2312.03732: alpha / sqrt(r).
        """
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def modules_of(self, base: nn.Module) -> list[str]:
        """The names of the base's modules, and of fused parameters, that get an adapter."""
        linear = [name for name, module in base.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
        chosen = [n for n in linear if self._is_target(n) and self._is_in_layers(n) and not _selects(self.excluded, n)]
        return chosen + [n for n, p in base.named_parameters() if p.dim() == 3 and _selects(self.parameters, n)]

    def _is_target(self, name: str) -> bool:
        if self.targets == "all-linear":
            return name.split(".")[-1] not in ("lm_head", "embed_tokens")
        return _selects(self.targets, name)

    def _is_in_layers(self, name: str) -> bool:
        found = _LAYER.search(f".{name}")
        return self.layers is None or (found is not None and int(found[1]) in self.layers)


def _selects(modules: Sequence[str] | str, name: str) -> bool:
    """Whether a regular expression for whole names, or one of several endings, selects a module's name."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in modules)


def _matches(pattern: str, module: str) -> bool:
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None


def adapted_modules(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Group the LoRA matrices among parameter names by the module that they adapt.

    Args:
        names: The names of a model's parameters, in peft's form.
    Returns:
        ``{"A": parameter, "B": parameter}`` by the module's name in the base, and DoRA's ``"magnitude_vector"``.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = _MATRIX.match(name)
        if match:
            found.setdefault(match["module"], {})[match["matrix"]] = name
    return found


_MATRIX = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:embedding_)?(?P<matrix>[AB]|magnitude_vector)"
    r"(?:\.(?!weight|bias)\w+)?(?:\.weight)?$"
)


def base_name(name: str) -> str:
    """The name in the base of an adapted model's module or parameter that is not a LoRA matrix."""
    return re.sub(
        r"\.base_layer(?=\.|$)|\.modules_to_save\.\w+|\.original_module", "", name.removeprefix("base_model.model.")
    )
