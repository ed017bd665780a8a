"""The adapter that was asked for: which modules, of what rank, at what scale; independent of any library."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_LAYER = re.compile(r"\.(?:layers|h|blocks?)\.(\d+)\.")


@dataclass(frozen=True)
class LoraSpec:
    """LoRA as peft's options describe it.

    Args:
        rank: inner dimension of A and B.
        alpha: numerator of the scale.
        targets: endings of module names, or one regular expression for whole names; ``all-linear`` is every linear
            layer but the head.
        rank_pattern: pattern of a module's name to its rank, where that is another.
        alpha_pattern: the same for alpha.
        rank_stabilised: scale by the root of the rank.
        layers: numbers of the layers to adapt; None for all.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str = "all-linear"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> LoraSpec:
        """The one that options by peft's names ask for.

        Raises:
            ValueError: if it is of a kind this specification does not cover.
        """
        for option in ("use_dora", "use_bdlora", "exclude_modules", "target_parameters"):
            if asked.get(option):
                raise ValueError(f"{option} is not covered by the reference")
        targets, layers = asked.get("target_modules") or "all-linear", asked.get("layers_to_transform")
        return cls(
            rank=asked.get("r", 8),
            alpha=asked.get("lora_alpha", 8),
            targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
            rank_pattern=asked.get("rank_pattern") or {},
            alpha_pattern=asked.get("alpha_pattern") or {},
            rank_stabilised=bool(asked.get("use_rslora")),
            layers=None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
        )

    def rank_of(self, module: str) -> int:
        """Rank of a module's adapter."""
        return next((rank for key, rank in self.rank_pattern.items() if _matches(key, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of a module's adapter; found by its own pattern, whatever the rank's matched."""
        return next((alpha for key, alpha in self.alpha_pattern.items() if _matches(key, module)), self.alpha)

    def scale_of(self, module: str) -> float:
        """What ``B A`` of a module is multiplied by.

        Source: LoRA, arXiv 2106.09685, section 4.1: alpha / r; rsLoRA, arXiv 2312.03732: alpha / sqrt(r).
        """
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def modules_of(self, base: nn.Module) -> list[str]:
        """Names of the linear layers of a base that get an adapter."""
        linear = [name for name, module in base.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
        return [name for name in linear if self._is_target(name) and self._is_in_layers(name)]

    def _is_target(self, name: str) -> bool:
        if self.targets == "all-linear":
            return name.split(".")[-1] not in ("lm_head", "embed_tokens")
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.targets)

    def _is_in_layers(self, name: str) -> bool:
        found = _LAYER.search(f".{name}")
        return self.layers is None or (found is not None and int(found[1]) in self.layers)


def _matches(pattern: str, module: str) -> bool:
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None


def adapted_modules(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The LoRA matrices among parameter names, by the module they adapt.

    Args:
        names: of a model's parameters, as peft gives them.
    Returns:
        Module, by its name in the base, to ``{"A": parameter, "B": parameter}``.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = _MATRIX.match(name)
        if match:
            found.setdefault(match["module"], {})[match["matrix"]] = name
    return found


_MATRIX = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<matrix>[AB])(?:\.\w+)?\.weight$")


def base_name(name: str) -> str:
    """Name in the base of a parameter of the adapted model that is no LoRA matrix."""
    return re.sub(
        r"\.base_layer(?=\.|$)|\.modules_to_save\.\w+|\.original_module", "", name.removeprefix("base_model.model.")
    )
