"""What a recording states beside its tensors: the model, its adapter and dropout, the processes and the versions."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glm4ft.testing.recording import environment

LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "trl", "lightning",
    "llamafactory", "ms-swift", "axolotl",
)  # fmt: skip
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
        "commit": os.environ.get(environment.COMMIT, ""),
        "recorded_at": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
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
        "machine": machine(),
    }


def machine() -> dict[str, str]:
    """What may change the last bits of a run beside the versions: system, device, number of threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    system = f"{platform.system()} {platform.machine()}"
    return {"system": system, "device": device, "threads": str(torch.get_num_threads())}


def _cpu() -> str:
    """The name of the CPU and the instructions that torch uses on it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


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
