"""What a recording states beside its tensors: the model, its adapter and dropout, the processes and the versions."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from glm4ft.testing.recording import environment

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "trl", "lightning", "llamafactory", "ms-swift", "axolotl")
# Options of a model's configuration under which its logits are not the head's product, or its attention drops.
FACTORS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "attention_dropout", "attn_pdrop")


def describe(model: nn.Module, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a run at its first forward pass.

    Args:
        model: The model that is trained.
        configuration: What the run's own configuration states.
    """
    adapters = getattr(model, "peft_config", None) or {}
    adapter = next(iter(adapters.values()), None)
    config = getattr(model, "config", None)
    named = getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", "")
    return {
        "command": os.environ.get(environment.COMMAND, ""),
        "rank": int(os.environ.get("RANK", "0")),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "model": {
            "base": str(named or ""),
            "class": type(model).__name__,
            "type": str(getattr(config, "model_type", "")),
            "adapter": None if adapter is None else json.loads(json.dumps(adapter.to_dict(), default=_as_list)),
            "quantised": sum(hasattr(p, "quant_state") for p in model.parameters()),
            "factors": {name: value for name in FACTORS if (value := getattr(config, name, None))},
        },
        "configuration": dict(configuration),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _as_list(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
