"""Faults that are visible in the files of a run are explained from these files; the whole list is a sweep.

Run: pytest tests/testing/test_explained_faults.py        (all: python tests/sweeps/explain_faults.py)
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.faults.registry import all_faults

SWEEP = Path(__file__).parents[1] / "sweeps" / "explain_faults.py"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("explain_faults", SWEEP)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_list_names_faults_that_there_are(sweep: ModuleType) -> None:
    assert set(sweep.CASES) <= set(all_faults())


@pytest.mark.parametrize("fault", ["stop-token-masked-as-pad"])
def test_fault_is_explained_from_what_its_run_left(fault: str, sweep: ModuleType, tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    case, subject = sweep.CASES[fault], all_faults()[fault].subject(str(base))
    sweep.leave_run(subject, base, case, tmp_path / "run")
    assert sweep.explain(tmp_path / "run", base, case).verdict == case.verdict
