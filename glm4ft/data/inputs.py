"""What a ``data`` option names: files, patterns of files, folders and data sets of the hub, each with a weight."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import glm4ft
from glm4ft.errors import ConfigError, Location

DEMO_DATA = Path(glm4ft.__file__).parent / "demo" / "two_conversations.jsonl"
DataNames = str | os.PathLike[str] | Sequence[str]
_WEIGHT = re.compile(r"=(\d+(?:\.\d*)?|\.\d+)\Z")
# By which a missing file is told from a data set of the hub.
_FILE_SUFFIXES = (
    ".jsonl", ".json", ".ndjson", ".txt", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip",
)  # fmt: skip
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class DataInput:
    """One file or data set of conversations.

    Args:
        name: The path, or the id of a data set of the hub.
        weight: How often its rows are trained in an epoch: 2 is twice, 0.5 is every other row.
    """

    name: str
    weight: float = 1.0

    @property
    def is_file(self) -> bool:
        """Whether it is one file, so that its bytes tell whether it has changed."""
        return not is_set(self.name)

    def repeats(self, index: int) -> int:
        """How often a row is trained in an epoch; all of them together come to the weight, evenly over the file.

        Args:
            index: The number of the row in this input, from 0.
        """
        return math.floor((index + 1) * self.weight) - math.floor(index * self.weight)


def data_inputs(data: DataNames) -> list[DataInput]:
    """The inputs that a ``data`` option names, in order.

    Args:
        data: ``demo``; a path, a pattern (``data/*.jsonl``) or an id of the hub (``org/name:split``), each perhaps with
            ``=weight`` behind it; or several of them, in a list or with commas between.
    Raises:
        ConfigError: If a weight is not above zero.
        DataError: If a file is not there.
    """
    if isinstance(data, str):
        names = [data] if os.path.lexists(data) else [part.strip() for part in data.split(",") if part.strip()]
    else:
        names = [os.fspath(data)] if isinstance(data, os.PathLike) else list(data)
    if not names:
        raise ConfigError("no conversations to train on", where="--data", expected="a JSONL file, or 'demo'")
    return [one for name in names for one in _inputs(name)]


def is_set(name: str) -> bool:
    """Whether a name is that of a folder, or of a data set of the hub, and no file that is or might have been there.

    Args:
        name: ``folder``, ``org/name``, or one of them with ``:split`` or ``:config:split`` behind it.
    """
    path = name.partition(":")[0]
    if os.path.isdir(name) or (os.path.isdir(path) and not os.path.exists(name)):
        return True
    parts = path.split("/")
    looks_like_an_id = len(parts) == 2 and all(part[:1].isalnum() for part in parts) and "\0" not in name
    looks_like_an_id = looks_like_an_id and not _PATTERN.search(path)  # unlike behind the colon: org/name:train[:100]
    looks_like_a_file = path.lower().endswith(_FILE_SUFFIXES) or os.path.lexists(name) or os.path.lexists(parts[0])
    return looks_like_an_id and not looks_like_a_file


def _inputs(text: str) -> list[DataInput]:
    name, weight = text, 1.0
    if not os.path.lexists(text) and (match := _WEIGHT.search(text)):
        name, weight = text[: match.start()], float(match[1])
        if not 0 < weight <= 1000:
            raise ConfigError("a weight out of range", where="--data", found=text, expected="above 0, at most 1000")
    if name == "demo":
        return [DataInput(str(DEMO_DATA), weight)]
    if not os.path.lexists(name) and _PATTERN.search(name) and not is_set(name):
        found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not found:
            raise Location(name).wrong("no file fits this pattern", name, "a pattern such as data/*.jsonl")
        return [DataInput(path, weight) for path in found]
    if not is_set(name):
        _require_there(name)
    return [DataInput(name, weight)]


def _require_there(name: str) -> None:
    try:
        os.stat(name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = "check the path; a data set of the hub is named org/name"
        raise Location(name).wrong(f"a file cannot be read: {reason}", name, "a file that can be read", fix) from None
