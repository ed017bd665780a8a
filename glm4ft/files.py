"""Atomic file writes, and records that strict JSON can represent."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Replace a file by a complete new one, or leave it as it was."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine may leave the new name on an empty file
        os.replace(unfinished, path)
    except OSError as error:
        error.filename = os.fspath(path)  # the caller's path, not that of the temporary file beside it
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def finite(value: Any) -> float | None:
    """Convert a number to a float that strict JSON can represent.

    Args:
        value: A number of any kind, or None.
    Returns:
        The number as a float; None for None, NaN and infinities.
    """
    return float(value) if value is not None and math.isfinite(value) else None


def finite_or_null(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and Infinity in a record, which strict JSON cannot represent.

    Args:
        record: Names and values.
    Returns:
        The record with None in place of each non-finite float, and ``"finite": False`` if there was one.
    """
    is_finite = {name: not isinstance(value, float) or math.isfinite(value) for name, value in record.items()}
    kept = {name: value if is_finite[name] else None for name, value in record.items()}
    return kept if all(is_finite.values()) else {**kept, "finite": False}
