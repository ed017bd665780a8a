"""Where curves were measured, and how equal two places are: it decides what difference is no alarm."""

from __future__ import annotations

import importlib.metadata
import platform
from enum import Enum

from glm4ft.testing.recording.description import machine

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "glm4ft")


class Tier(Enum):
    """How equal two environments are; the value is how messages call it."""

    SAME_COMMIT = "the same commit in the same environment"
    SAME_LIBRARIES = "the same machine and libraries"
    OTHER = "other libraries or another device"


def environment() -> dict[str, str]:
    """Everything that may change the last bits of a run: versions, device, number of threads."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return {**found, **machine()}
