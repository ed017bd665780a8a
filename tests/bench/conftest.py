"""What is kept of a benchmark's machine and run: nothing that names either."""

from __future__ import annotations

import importlib.metadata
from typing import Any

LIBRARIES = ("glm4ft", "torch", "transformers", "peft", "accelerate", "tokenizers", "trl")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    kept = ("system", "machine", "python_implementation", "python_version")
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if _is_installed(name)}
    cpu = {key: machine_info["cpu"].get(key) for key in ("brand_raw", "arch", "count")}
    described = {key: machine_info[key] for key in kept} | {"cpu": cpu, "libraries": versions}
    machine_info.clear()
    machine_info.update(described)


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    described = {key: commit_info[key] for key in ("id", "dirty") if key in commit_info}
    commit_info.clear()
    commit_info.update(described)


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
