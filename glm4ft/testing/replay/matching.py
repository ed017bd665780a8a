"""Which rows went through a forward pass, and where: found by their ids, whatever mask and positions say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from glm4ft.testing.recording.trace import Forward
from glm4ft.testing.specification.reference import LabelledIds, split_rows


@dataclass(frozen=True)
class RowSpan:
    """Where a row stands in a forward pass.

    Args:
        ids: of the row.
        b: index in the batch.
        start: first position.
    """

    ids: tuple[int, ...]
    b: int
    start: int

    @property
    def positions(self) -> torch.Tensor:
        """Its positions."""
        return torch.arange(self.start, self.start + len(self.ids))


@dataclass(frozen=True)
class RowMatches:
    """What was found in one forward pass.

    Args:
        rows: known rows, in order.
        unknown: ids of stretches that are no known row and no padding.
        padding_BT: True where a position belongs to no row.
    """

    rows: tuple[RowSpan, ...]
    unknown: tuple[tuple[int, ...], ...]
    padding_BT: torch.Tensor


class KnownRows:
    """The rows that the data should have become, to be found again.

    Args:
        rows: as encoded; no two with the same ids.
    """

    def __init__(self, rows: Iterable[LabelledIds]) -> None:
        self.labels = dict(rows)
        self.by_first: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for ids in sorted(self.labels, key=len, reverse=True):  # one row may begin another
            self.by_first[ids[0]].append(ids)

    def find_in(self, forward: Forward) -> RowMatches:
        """Find them in a forward pass."""
        spans: list[RowSpan] = []
        padding = torch.ones(forward.input_ids_BT.shape, dtype=torch.bool)
        for b, ids_T in enumerate(forward.input_ids_BT.tolist()):
            spans += self._in_sequence(b, tuple(ids_T))
        for span in spans:
            padding[span.b, span.positions] = False
        return RowMatches(tuple(spans), tuple(self._unknown(forward, padding)), padding)

    def _in_sequence(self, b: int, ids: tuple[int, ...]) -> Iterable[RowSpan]:
        t = 0
        while t < len(ids):
            found = next((row for row in self.by_first.get(ids[t], ()) if ids[t : t + len(row)] == row), None)
            if found:
                yield RowSpan(found, b, t)
            t += len(found) if found else 1

    def _unknown(self, forward: Forward, padding: torch.Tensor) -> Iterable[tuple[int, ...]]:
        """What is neither a row nor filled with one id, in the pieces that mask and positions make of it."""
        fill = Counter(forward.input_ids_BT[padding].tolist())
        if len(fill) < 2:
            return
        for b, positions in split_rows(forward):
            ids, is_padding = forward.input_ids_BT[b][positions], padding[b][positions]
            if is_padding.any() and len(set(ids[is_padding].tolist())) > 1:
                yield tuple(ids[is_padding].tolist())


def is_part_of(piece: tuple[int, ...], row: tuple[int, ...]) -> bool:
    """Whether ids stand in a row one after the other."""
    return any(row[at : at + len(piece)] == piece for at in range(len(row) - len(piece) + 1))
