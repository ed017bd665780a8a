"""Trained rows in flat arrays: 4 bytes a token and 9 more a supervised one, so that a million conversations fit.

Shapes: T tokens, R rows, N supervised tokens in reading order.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from glm4ft.data.encoded_row import IGNORED
from glm4ft.data.encoded_rows import TrainedRow, TurnMarkers, token_origins

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FlatRows:
    """The tokens of a data set, and its supervised ones.

    Args:
        ids_T: The token ids of all rows, int32.
        starts_R: The index in ``ids_T`` of each row's first token.
        lengths_R: The number of tokens of each row.
        lines_R: The line of each row's conversation in its file.
        num_targets_R: The number of supervised tokens of each row.
        token_N: The label of each supervised token, int32.
        position_N: The position of each supervised token in its row, int32.
        part_N: The index in ``parts`` of the kind of each supervised token, uint8.
        parts: The kinds of supervised tokens, e.g. ``assistant body``.
    """

    ids_T: Array
    starts_R: Array
    lengths_R: Array
    lines_R: Array
    num_targets_R: Array
    token_N: Array
    position_N: Array
    part_N: Array
    parts: tuple[str, ...]

    @classmethod
    def of(cls, rows: Iterable[TrainedRow], markers: TurnMarkers) -> FlatRows:
        """Read rows, one after the other.

        Args:
            rows: The rows as trained. A label on the first token of a row is ignored: no model predicts it.
            markers: The ids by which the parts of a row are told.
        """
        ids, lengths, lines, num_targets = array("i"), array("q"), array("q"), array("q")
        tokens, positions, part_numbers, parts = array("i"), array("i"), array("B"), dict[str, int]()
        for row in _with_progress(rows):
            ids.extend(row.input_ids)
            lengths.append(len(row.input_ids))
            lines.append(row.line)
            targets = [at for at, label in enumerate(row.labels) if label != IGNORED and at]
            num_targets.append(len(targets))
            positions.extend(targets)
            tokens.extend(row.labels[at] for at in targets)
            origins = token_origins(row.input_ids, markers)
            names = (f"{origins[at].role} {origins[at].part}".strip() for at in targets)
            part_numbers.extend(parts.setdefault(name, len(parts)) for name in names)
        length_R = _array(lengths)
        return cls(
            ids_T=_array(ids),
            starts_R=np.cumsum(length_R) - length_R,
            lengths_R=length_R,
            lines_R=_array(lines),
            num_targets_R=_array(num_targets),
            token_N=_array(tokens),
            position_N=_array(positions),
            part_N=_array(part_numbers),
            parts=tuple(parts),
        )


def _with_progress(rows: Iterable[TrainedRow]) -> Iterator[TrainedRow]:
    # delay: short work shows no bar; disable=None: no bar where stderr is not a terminal
    return iter(tqdm(rows, desc="reading", unit=" conversations", delay=2, disable=None, leave=False))


def _array(numbers: array[int]) -> Array:
    """View the numbers as an array, without a copy."""
    return np.frombuffer(numbers, dtype=numbers.typecode) if numbers else np.empty(0, dtype=numbers.typecode)
