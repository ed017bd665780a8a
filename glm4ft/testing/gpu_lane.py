"""The base that tests run on, and what they judge on one of the true size.

The header of a test run asks here, so nothing heavy is imported before a base is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from glm4ft.testing.geometry import RANDOM_PREFIX, size_of

TINY = "tiny"
# From this many parameters on, every run of a check loads gigabytes and has to be worth it.
LARGE = 1e9

# Checks that are left out on a large base; all others run.
LEFT_OUT: Mapping[str, str] = {}


def left_out(spec: str, check: str) -> str:
    """Why a check is left out on a base, or "" if it runs.

    Args:
        spec: of the base, as for ``--glm4ft-model``.
        check: its name.
    """
    return LEFT_OUT.get(check, "") if size_of(spec) >= LARGE else ""


def describe_lane(spec: str) -> str:
    """One line on what is judged on a base: the full set of checks or the reduced one."""
    size = size_of(spec)
    told = f"{size / 1e9:.2f} billion parameters" if 0 < size < float("inf") else "size unknown before it is loaded"
    if size < LARGE:
        return f"full set of checks on {spec}"
    return f"reduced set of checks on {spec} ({told}); left out: {', '.join(LEFT_OUT)}"


def write_base(spec: str, folder: Path, dtype: str = "fp32") -> str:
    """Make a base available.

    Args:
        spec: ``tiny``, ``random:NAME``, a folder or a hub id.
        folder: is created for what has to be written.
        dtype: ``bf16`` or ``fp32``, of what is written; a checkpoint stays as it is.
    Returns:
        A folder; or the hub id, which is downloaded by whoever loads it.
    """
    if spec != TINY and not spec.startswith(RANDOM_PREFIX):
        return spec
    from glm4ft.base_model import DTYPES
    from glm4ft.tiny import write_tiny_base

    if spec == TINY:
        return str(write_tiny_base(folder, dtype=DTYPES[dtype]))
    from glm4ft.testing.random_base import write_random_base

    return str(write_random_base(spec, folder, dtype=DTYPES[dtype]))
