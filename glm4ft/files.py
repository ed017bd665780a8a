"""Files written whole or not at all, folders that are not overwritten, and records that strict JSON can hold."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4ft.errors import ConfigError


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by a complete new one, or leave it as it was."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, "utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        error.filename = os.fspath(path)  # what the caller asked for, and not the file of our own beside it
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def finite(value: Any) -> float | None:
    """A number as strict JSON can hold it.

    Args:
        value: A number of any kind, or None.
    Returns:
        A float; None for None, NaN and infinities.
    """
    return float(value) if value is not None and math.isfinite(value) else None


def finite_or_null(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without NaN and Infinity, which strict JSON does not know.

    Args:
        record: Names and values.
    Returns:
        The record, floats that are not finite as None beside ``"finite": False``.
    """
    is_finite = {name: not isinstance(value, float) or math.isfinite(value) for name, value in record.items()}
    kept = {name: value if is_finite[name] else None for name, value in record.items()}
    return kept if all(is_finite.values()) else {**kept, "finite": False}


def require_unused(output: Path, fix: str = "choose another folder") -> None:
    """Refuse to write into a folder that holds something.

    Args:
        output: folder that a checkpoint or a run is to become.
        fix: what can be done instead.
    Raises:
        ConfigError: if it is there and not empty, or no folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            "the output folder is already in use",
            where="--output",
            found=str(output),
            expected="a folder that is empty or does not exist",
            fix=fix,
        )
