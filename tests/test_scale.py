"""The formula of docs/scale.md for the memory of a step agrees with measured steps, and the page is what it says.

Run: pytest tests/test_scale.py
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs docs/; the source distribution has none")


@pytest.fixture(scope="module")
def script() -> Any:
    spec: Any = importlib.util.spec_from_file_location("memory_of_a_run", DOCS / "memory_of_a_run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("number", range(9))
def test_formula_is_within_a_tenth_of_a_measured_step(script: Any, number: int) -> None:
    """Measured with torch 2.13: -1.4 to +0.6 %; with checkpointing +7.2 and +9.3 % in fp32, -0.3 to +1.2 % in bf16.

    In bf16 with checkpointing it is -3.1 and -5.1 % on a CPU without bf16 instructions, whose kernels copy more.
    """
    config, step = script.SMALL[number]
    said, was = script.compared(config, step)
    least, most = (0.9, 1.1) if step.checkpointing else (0.97, 1.03)
    assert least < said / was < most


def test_page_is_what_the_formula_says(script: Any) -> None:
    """But for the measured errors, which another version of torch may move."""
    written = (DOCS / "scale.md").read_text("utf-8")
    errors = re.search(r"^\| hidden \|.*?(?=\n\n|\n?\Z)", written, re.DOTALL | re.MULTILINE)
    assert errors is not None
    assert script.page(errors[0]) == written
    assert errors[0].count("\n") == 1 + len(script.SMALL)
