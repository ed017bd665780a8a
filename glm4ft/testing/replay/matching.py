"""Finds the known rows in a forward pass by their ids, independently of attention mask and position ids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.recording.trace import Forward
from glm4ft.testing.specification.recovered_targets import split_rows
from glm4ft.testing.specification.reference import LabelledIds

TokenWeights = Mapping[tuple[int, ...], Sequence[float]]  # of each token of a row, by the row's ids


@dataclass(frozen=True)
class RowSpan:
    """The location of a row in a forward pass.

    Args:
        ids: The token ids of the row.
        b: The index of its sequence in the batch.
        start: The position of its first token.
        is_short: Whether the last token is not there: some trainers shift in the data, and feed ids without the last
            beside labels without the first.
    """

    ids: tuple[int, ...]
    b: int
    start: int
    is_short: bool = False

    @property
    def positions(self) -> torch.Tensor:
        """The positions of the row's tokens in its sequence."""
        return torch.arange(self.start, self.start + len(self.ids) - self.is_short)

    @property
    def targets(self) -> torch.Tensor:
        """The positions of the row's targets: where its tokens are, or where the missing last one would be."""
        return torch.arange(self.start, self.start + len(self.ids))


@dataclass(frozen=True)
class RowMatches:
    """The known rows found in one forward pass, and what is left beside them.

    Args:
        rows: The known rows, in order.
        unknown: The ids of each stretch that is neither a known row nor padding.
        beside: The ids of each such stretch that has a known row beside it.
        padding_BT: True where a position belongs to no known row.
    """

    rows: tuple[RowSpan, ...]
    unknown: tuple[tuple[int, ...], ...]
    beside: tuple[tuple[int, ...], ...]
    padding_BT: torch.Tensor


class KnownRows:
    """The rows that the data should be encoded as, searchable in forward passes.

    Args:
        rows: The encoded rows; no two have the same ids.
        weights: The weight of each token in the loss, by the row's ids, for rows whose supervised tokens do not all
            weigh 1. A token without weight is not supervised.
    """

    def __init__(self, rows: Iterable[LabelledIds], weights: TokenWeights | None = None) -> None:
        self.labels, self.weights = dict(rows), dict[tuple[int, ...], tuple[float, ...]]()
        for ids, labels in self.labels.items():
            given = self.weights[ids] = tuple((weights or {}).get(ids, (1.0,) * len(ids)))
            self.labels[ids] = tuple(label if w else IGNORED for label, w in zip(labels, given, strict=True))
        self.by_first: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for ids in sorted(self.labels, key=len, reverse=True):  # longest first: a row may begin another
            self.by_first[ids[0]].append(ids)

    def find_in(self, forward: Forward) -> RowMatches:
        """Find the known rows in a forward pass."""
        spans: list[RowSpan] = []
        padding = torch.ones(forward.input_ids_BT.shape, dtype=torch.bool)
        for b, ids_T in enumerate(forward.input_ids_BT.tolist()):
            spans += self._in_sequence(b, tuple(ids_T))
        for span in spans:
            padding[span.b, span.positions] = False
        stretches = list(self._unknown(forward, padding))
        unknown = tuple(ids for ids, is_beside in stretches if not is_beside)
        return RowMatches(tuple(spans), unknown, tuple(ids for ids, is_beside in stretches if is_beside), padding)

    def _in_sequence(self, b: int, ids: tuple[int, ...]) -> Iterable[RowSpan]:
        t = 0
        while t < len(ids):
            span = next(self._spans_at(b, t, ids), None)
            if span:
                yield span
            t += len(span.positions) if span else 1

    def _spans_at(self, b: int, t: int, ids: tuple[int, ...]) -> Iterator[RowSpan]:
        """The rows that begin at a position, whole ones first."""
        rows = self.by_first.get(ids[t], ())
        yield from (RowSpan(row, b, t) for row in rows if ids[t : t + len(row)] == row)
        yield from (RowSpan(row, b, t, True) for row in rows if len(row) > 1 and ids[t : t + len(row) - 1] == row[:-1])

    def _unknown(self, forward: Forward, padding: torch.Tensor) -> Iterator[tuple[tuple[int, ...], bool]]:
        """Ids outside of known rows that are not padding, and whether a known row is beside them.

        A mask that leaves anything out leaves padding out, unless it leaves out tokens of known rows; without a mask,
        padding is whatever consists of one id.
        """
        mask, fill = forward.attention_mask, set(forward.input_ids_BT[padding].tolist())
        is_masked = mask is not None and mask.dim() == 2 and not bool(mask.bool().all())
        if is_masked and mask is not None and mask.shape == padding.shape:
            is_masked = bool(mask.bool()[~padding].all())
        if len(fill) < 2 and not is_masked:
            return
        for b, positions in split_rows(forward):
            ids, is_unknown = forward.input_ids_BT[b][positions], padding[b][positions]
            found = tuple(ids[is_unknown].tolist())
            if found and (is_masked or len(set(found)) > 1):
                yield found, not bool(is_unknown.all())


def is_part_of(piece: tuple[int, ...], row: tuple[int, ...]) -> bool:
    """Whether a row contains the ids as a contiguous piece."""
    return any(row[at : at + len(piece)] == piece for at in range(len(row) - len(piece) + 1))
