"""Encoded rows on disk: written portion by portion, read back by memory map."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glm4ft.data.batching import Item, RowSet
from glm4ft.data.encoded_row import IGNORED, AssistantTurn, EncodedRow
from glm4ft.data.inputs import DataInput

if TYPE_CHECKING:
    from glm4ft.data.portions import Portion


class RowsWriter(contextlib.AbstractContextManager["RowsWriter"]):
    """Writes the rows of one file, for ``Rows`` to read.

    Args:
        folder: The folder of the rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ids = open(folder / "input_ids.int32", "wb")  # noqa: SIM115  closed in __exit__
        self._supervised = open(folder / "supervised.bool", "wb")  # noqa: SIM115
        self._kept: dict[str, list[Any]] = {"lengths": [], "lines": [], "turns": [], "num_turns": []}

    def write(self, portion: Portion) -> None:
        """Write further rows.

        Args:
            portion: The rows.
        """
        self._ids.write(portion.input_ids.tobytes())
        self._supervised.write(portion.supervised.tobytes())
        for name, arrays in self._kept.items():
            arrays.append(getattr(portion, name))

    def __exit__(self, *error: object) -> None:
        self._ids.close()
        self._supervised.close()
        if error[0] is None:
            np.save(self.folder / "offsets.npy", _offsets(self._kept["lengths"]))
            np.save(self.folder / "lines.npy", _joined(self._kept["lines"]))
            np.save(self.folder / "turns.npy", _joined(self._kept["turns"], 4))
            np.save(self.folder / "turn_offsets.npy", _offsets(self._kept["num_turns"]))


class Rows(RowSet):
    """Encoded rows of one file, read by memory map.

    Args:
        folder: The folder of the rows, as ``prepare_rows`` writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.input_ids = _mapped(folder / "input_ids.int32", np.int32)
        self.supervised = _mapped(folder / "supervised.bool", np.bool_)
        self.offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        self.lines = np.load(folder / "lines.npy", allow_pickle=False)
        self.turns = np.load(folder / "turns.npy", mmap_mode="r", allow_pickle=False)
        self.turn_offsets = np.load(folder / "turn_offsets.npy", allow_pickle=False)
        self.lengths = np.diff(self.offsets)

    def sha256(self) -> str:
        """Digest of the rows themselves, by which a resumed run recognises its data."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.supervised, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def target_counts(self) -> Counter[int]:
        """How often each token is a target."""
        ids, counts = np.unique(self.input_ids[self.supervised], return_counts=True)
        return Counter(dict(zip(ids.tolist(), counts.tolist(), strict=True)))

    def __getitem__(self, index: int) -> Item:
        span = slice(self.offsets[index], self.offsets[index + 1])
        input_ids = np.array(self.input_ids[span], dtype=np.int64)
        labels = np.where(self.supervised[span], input_ids, IGNORED)
        return {"input_ids": input_ids, "labels": labels, "lines": [int(self.lines[index])]}

    def encoded(self, index: int) -> EncodedRow:
        """A row with its turns, as it was encoded; its segments are not kept.

        Args:
            index: The number of the row, from 0.
        """
        span = slice(self.offsets[index], self.offsets[index + 1])
        turns = self.turns[self.turn_offsets[index] : self.turn_offsets[index + 1]].tolist()
        return EncodedRow(
            self.input_ids[span].tolist(),
            self.supervised[span].tolist(),
            (),
            tuple(AssistantTurn(message, start, end, bool(keep)) for message, start, end, keep in turns),
            int(self.lines[index]),
        )


class JoinedRows(RowSet):
    """The rows of several inputs, or of one with a weight: each as often as its weight says.

    Args:
        parts: The rows of the inputs.
        inputs: The inputs.
        offsets: What is added to the lines of each input, so that no two conversations share a line.
    """

    def __init__(self, parts: Sequence[Rows], inputs: Sequence[DataInput], offsets: Sequence[int]) -> None:
        self.parts, self.offsets = parts, offsets
        copies = [repeats(one, len(part)) for one, part in zip(inputs, parts, strict=True)]
        self.part = np.concatenate([np.full(int(c.sum()), number) for number, c in enumerate(copies)])
        self.index = np.concatenate([np.repeat(np.arange(len(c)), c) for c in copies])
        self.lengths = np.concatenate([np.repeat(p.lengths, c) for p, c in zip(parts, copies, strict=True)])

    def sha256(self) -> str:
        """Digest of the rows and of how often each is trained."""
        digest = hashlib.sha256("".join(part.sha256() for part in self.parts).encode())
        digest.update(self.part.astype(np.int64).tobytes() + self.index.astype(np.int64).tobytes())
        return digest.hexdigest()

    def target_counts(self) -> Counter[int]:
        """How often each token is a target in an epoch."""
        labels = (self[index]["labels"] for index in range(len(self)))
        return Counter(token for row in labels for token in row[row != IGNORED].tolist())

    def __getitem__(self, index: int) -> Item:
        part = int(self.part[index])
        item = self.parts[part][int(self.index[index])]
        return {**item, "lines": [line + self.offsets[part] for line in item["lines"]]}

    def encoded(self, index: int) -> EncodedRow:
        """A row with its turns, as it was encoded; its segments are not kept.

        Args:
            index: The number of the row, from 0.
        """
        part = int(self.part[index])
        row = self.parts[part].encoded(int(self.index[index]))
        return replace(row, line=row.line + self.offsets[part])


def repeats(one: DataInput, num_rows: int) -> np.ndarray[Any, Any]:
    """How often each row of an input is trained in an epoch, by its weight.

    Args:
        one: The input.
        num_rows: The number of its rows.
    """
    return np.array([one.repeats(index) for index in range(num_rows)], dtype=np.int64)


def _joined(arrays: Sequence[Any], *width: int) -> np.ndarray[Any, Any]:
    return np.concatenate([np.zeros((0, *width), np.int64), *arrays])


def _offsets(sizes: Sequence[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([[0], np.cumsum(_joined(sizes))])


def _mapped(path: Path, dtype: Any) -> np.ndarray[Any, Any]:
    # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
