"""Trained rows in flat arrays: 5 bytes a token and 5 more a supervised one, so that a million conversations fit.

Shapes: T tokens, R rows, N supervised tokens in reading order.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from tqdm import tqdm

from glm4ft.data.encoded_row import IGNORED
from glm4ft.data.encoded_rows import TrainedRow, TurnMarkers, token_origins

Array = np.ndarray[Any, Any]
_CHUNK = 2**20


@dataclass(frozen=True)
class FlatRows:
    """The tokens of a data set, and its supervised ones.

    Args:
        ids_T: The token ids of all rows, int32.
        is_target_T: Whether each token is supervised, uint8.
        starts_R: The index in ``ids_T`` of each row's first token.
        lengths_R: The number of tokens of each row.
        lines_R: The line of each row's conversation in its file.
        num_targets_R: The number of supervised tokens of each row.
        token_N: The label of each supervised token, int32.
        part_N: The index in ``parts`` of the kind of each supervised token, uint8.
        parts: The kinds of supervised tokens, e.g. ``assistant body``.
    """

    ids_T: Array
    is_target_T: Array
    starts_R: Array
    lengths_R: Array
    lines_R: Array
    num_targets_R: Array
    token_N: Array
    part_N: Array
    parts: tuple[str, ...]

    @classmethod
    def of(cls, rows: Iterable[TrainedRow], markers: TurnMarkers) -> FlatRows:
        """Read rows, one after the other.

        Args:
            rows: The rows as trained. A label on the first token of a row is ignored: no model predicts it.
            markers: The ids by which the parts of a row are told.
        """
        ids, flags, lengths, lines, num_targets = array("i"), array("B"), array("q"), array("q"), array("q")
        tokens, part_numbers, parts = array("i"), array("B"), dict[str, int]()
        for row in _with_progress(rows):
            ids.extend(row.input_ids)
            lengths.append(len(row.input_ids))
            lines.append(row.line)
            is_target = [at > 0 and label != IGNORED for at, label in enumerate(row.labels)]
            flags.extend(is_target)
            num_targets.append(sum(is_target))
            tokens.extend(compress(row.labels, is_target))
            origins = compress(token_origins(row.input_ids, markers), is_target)
            names = (f"{origin.role} {origin.part}".strip() for origin in origins)
            part_numbers.extend(parts.setdefault(name, len(parts)) for name in names)
        length_R = _array(lengths)
        return cls(
            ids_T=_array(ids),
            is_target_T=_array(flags),
            starts_R=np.cumsum(length_R) - length_R,
            lengths_R=length_R,
            lines_R=_array(lines),
            num_targets_R=_array(num_targets),
            token_N=_array(tokens),
            part_N=_array(part_numbers),
            parts=tuple(parts),
        )


def chunks(length: int) -> Iterator[slice]:
    """Split a range in pieces: numpy makes 8 bytes of every index, which of all tokens at once is more than they take.

    Args:
        length: The length of the range.
    """
    return (slice(start, start + _CHUNK) for start in range(0, length, _CHUNK))


def counts(numbers: Array) -> Array:
    """Count how often each number occurs, as ``np.bincount`` does, in pieces.

    Args:
        numbers: Whole numbers, none below 0.
    """
    found = np.zeros(int(numbers.max(initial=0)) + 1, dtype=np.int64)
    for piece in chunks(len(numbers)):
        found += np.bincount(numbers[piece], minlength=len(found))
    return found


def _with_progress(rows: Iterable[TrainedRow]) -> Iterator[TrainedRow]:
    # delay: short work shows no bar; disable=None: no bar where stderr is not a terminal
    return iter(tqdm(rows, desc="reading", unit=" conversations", delay=2, disable=None, leave=False))


def _array(numbers: array[int]) -> Array:
    """View the numbers as an array, without a copy."""
    return np.frombuffer(numbers, dtype=numbers.typecode) if numbers else np.empty(0, dtype=numbers.typecode)
