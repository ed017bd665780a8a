"""Parquet and Arrow files, and data sets of the hub or of a folder, read with Hugging Face's datasets.

Columns fill what a row lacks with nulls, at every depth, so null keys of rows say nothing and are left out. That
includes the arguments of calls; where a null is an argument, store the arguments as JSON text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from glm4ft.errors import DataError, Location

_COLON = re.compile(r":(?![^\[]*\])")  # not the one of a slice: train[:100]
_INSTALL = "install it: pip install 'glm4ft[data]'"


def read_file(kind: str, name: str) -> Iterator[tuple[Location, Any]]:
    """Read the rows of a Parquet or Arrow file, a part of it at a time.

    Args:
        kind: ``parquet`` or ``arrow``.
        name: The path.
    Raises:
        DataError: If datasets is not installed, or cannot read the file.
    """
    datasets = _datasets(name, f"a {kind} file is read with datasets, which is not installed")
    try:
        rows = datasets.load_dataset(kind, data_files=name, split="train", streaming=True)
        yield from _numbered(name, rows)
    except DataError:
        raise
    except Exception as error:  # whatever the library's formats raise
        raise _unreadable(name, error) from error


def read_set(name: str) -> Iterator[tuple[Location, Any]]:
    """Read the rows of a data set of the hub, or of a folder.

    Args:
        name: The folder, or the id: ``org/name``, ``org/name:split`` or ``org/name:config:split``; a split may be
            a slice, ``train[:100]``.
    Raises:
        DataError: If datasets is not installed, or cannot read the data set.
    """
    yield from _numbered(name, load_set(name))


def load_set(name: str) -> Any:
    """The data set of the hub or of a folder, as datasets holds it: mapped from disk."""
    path, *options = [name] if os.path.exists(name) else _COLON.split(name)
    what = "a folder" if os.path.isdir(path) else "a data set of the hub"
    datasets = _datasets(name, f"{what} is read with datasets, which is not installed")
    config, split = (options[0] if len(options) > 1 else None), (options[-1] if options else "train")
    try:
        if any(os.path.exists(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(path)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(path, config, split=split)
    except Exception as error:  # whatever the hub and the library raise
        raise _unreadable(name, error) from error


def set_digest(name: str) -> bytes:
    """What changes when the data set does: the fingerprint by which datasets caches it."""
    found = load_set(name)
    return str(found._fingerprint).encode()


def _datasets(name: str, problem: str) -> Any:
    try:
        import datasets
    except ImportError:
        fix = _INSTALL
        if os.path.isdir(name):
            fix = f"name its files: {os.path.join(name, '*.jsonl')}, or {_INSTALL}"
        raise Location(name).wrong(problem, "no module datasets", "datasets 4.4 or newer", fix) from None
    return datasets


def _numbered(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Location, Any]]:
    for number, row in enumerate(rows, 1):
        yield Location(name, number, unit="record"), without_filled(row)


def without_filled(value: Any) -> Any:
    """A value of a table without the null keys that columns fill in."""
    if isinstance(value, Mapping):
        return {key: without_filled(item) for key, item in value.items() if item is not None}
    return [without_filled(item) for item in value] if isinstance(value, list) else value


def _unreadable(name: str, error: Exception) -> DataError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    fix = "check the name; of a data set: org/name:split or org/name:config:split, with what it has"
    cause = cast(str, getattr(error, "strerror", None) or said)
    what = "directory" if os.path.isdir(name) else "file" if os.path.exists(name) else "data set"
    return DataError(
        f"datasets cannot read this {what}", where=name, found=cause, expected="rows of conversations", fix=fix
    )
