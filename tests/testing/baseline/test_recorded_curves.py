"""The curves in tests/baselines: one file for each format of the built-in base, padded and packed.

Run: pytest tests/testing/baseline/test_recorded_curves.py
All of them are compared by ``tox run -e baselines``, which takes some minutes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from glm4ft.data.turn_format import FORMATS
from glm4ft.testing.baseline.baseline_file import read_baseline, write_baseline
from glm4ft.testing.baseline.compare import compare_again

FOLDER = Path(__file__).parents[2] / "baselines"
OWN = "glm4ft.testing.subjects.own:Subject"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("batches", ["padded", "packed"])
def test_each_format_has_curves_of_its_own(name: str, batches: str) -> None:
    found = read_baseline(FOLDER / f"{name}-{batches}.jsonl")
    assert found.source == f"{OWN} on tiny:{name}"
    assert found.identity.plan["packing"] == (batches == "packed")
    assert len(found.curves) == 8
    assert all(curve.is_finite for curve in found.curves)


def test_training_still_gives_the_recorded_curves(tmp_path: Path) -> None:
    """With the first five seeds, to save time."""
    recorded = read_baseline(FOLDER / "glm-4-0414-padded.jsonl")
    write_baseline(tmp_path / "b.jsonl", replace(recorded, curves=recorded.curves[:5]))
    found = compare_again(tmp_path / "b.jsonl")
    assert not found.is_alarm, str(found)
