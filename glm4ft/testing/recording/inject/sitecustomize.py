"""Starts the recorder in a Python process once it has imported torch; Python runs this file when it starts.

``glm4ft record`` puts this folder first on ``PYTHONPATH``. Nothing is imported here that the command might not have,
and another ``sitecustomize`` further down the path still runs.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.abspath(os.path.join(HERE, *[os.pardir] * 3))  # the folder glm4ft


def _load(name: str, path: str) -> Any:
    """A module from its file, outside of its package, which would import more."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = _load("_glm4ft_environment", os.path.join(HERE, os.pardir, "environment.py"))


class _Watch:
    """A finder that wraps the import of torch, and finds this package where it is not installed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "glm4ft":
            return importlib.util.spec_from_file_location(
                name, os.path.join(PACKAGE, "__init__.py"), submodule_search_locations=[PACKAGE]
            )
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_start(module: ModuleType) -> None:
            run(module)
            try:
                from glm4ft.testing.recording.attach import start

                start()
            except Exception as error:  # an old Python or torch: the command goes on unrecorded
                folder = environment.rank_folder(os.environ[environment.FOLDER])
                environment.note(folder, f"the recorder cannot run here: {error!r}")

        spec.loader.exec_module = run_and_start  # type: ignore[method-assign]
        return spec


def _run_other() -> None:
    """Run the ``sitecustomize`` that this one stands in front of, if there is one."""
    others = [folder for folder in sys.path if os.path.abspath(folder or os.curdir) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get(environment.FOLDER):
    sys.meta_path.insert(0, _Watch())
_run_other()
