"""Where curves were measured, and how equal two places are: it decides what difference is no alarm."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from enum import Enum
from pathlib import Path

import torch

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "glm4ft")


class Tier(Enum):
    """How equal two environments are; the value is how messages call it."""

    SAME_COMMIT = "the same commit in the same environment"
    SAME_LIBRARIES = "the same machine and libraries"
    OTHER = "other libraries or another device"


def environment() -> dict[str, str]:
    """Everything that may change the last bits of a run: versions, device, number of threads."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return {**found, "device": device, "threads": str(torch.get_num_threads())}


def _cpu() -> str:
    """The name of the CPU and the instructions that torch uses on it."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def commit(folder: Path) -> str:
    """The commit of the repository around a folder; "" outside of a repository, or before its first commit."""
    return _git(folder, "rev-parse", "HEAD").strip()


def uncommitted(folder: Path) -> list[str]:
    """The files of the repository around a folder that differ from its commit, or are not in it."""
    return [line[3:] for line in _git(folder, "status", "--porcelain").splitlines()]


def _git(folder: Path, *arguments: str) -> str:
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
