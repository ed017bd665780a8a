"""Batches of rows, padded or packed, in an order that is a pure function of seed and epoch."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from glm4ft.data.encoded_row import IGNORED

Item = dict[str, Any]  # input_ids, labels, lines; a packed item also has position_ids

# Number of batches in the random window within which rows are sorted by length: enough to leave under 5 % of the slots
# empty on chat-like lengths at batch sizes from 2 to 32 (see tests/data/test_batching.py), few enough to keep the order
# random.
WINDOW = 64

# What a process is given when its share of an epoch's last step has no row left: a single token without a target.
FILLER, FILLER_LINE = -1, 0


class RowSet(Dataset[Item]):
    """A data set of rows.

    Attributes:
        lengths: The number of tokens of each row.
    """

    lengths: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items of a batch, as torch's loader asks for them; ``FILLER`` among the indices is no row."""
        filler = {"input_ids": np.array([0]), "labels": np.array([IGNORED]), "lines": [FILLER_LINE]}
        return [filler if index == FILLER else self[index] for index in indices]


class ShuffledByLength(Sampler[int]):
    """Yields every index once per epoch, in a random order in which neighbours have similar length.

    The order depends on seed and epoch alone, so a resumed run sees exactly the rows that the interrupted one would
    have seen.

    Args:
        lengths: The number of tokens of each row.
        batch_size: The number of rows per micro-batch; 1 gives a plain shuffle.
        seed: The seed of the shuffle.
        multiple: The number of rows that all processes take at once. ``FILLER`` comes last as often as rows lack:
            accelerate would repeat the first rows of the epoch, and train them twice.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray[Any, Any], batch_size: int, seed: int, multiple: int = 1
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0
        self.num_fillers = -len(self.lengths) % multiple

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.num_fillers

    def __iter__(self) -> Iterator[int]:
        yield from self._rows()
        yield from [FILLER] * self.num_fillers

    def _rows(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        if self.batch_size == 1:
            yield from order.tolist()
            return
        # The sort runs within windows of whole batches; then the batches are shuffled. The incomplete batch stays
        # last, or it would shift the others across their boundaries.
        window = self.batch_size * WINDOW
        order = np.concatenate(
            [w[np.argsort(self.lengths[w], kind="stable")] for w in np.split(order, range(window, len(order), window))]
        )
        whole = len(order) - len(order) % self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        yield from batches[rng.permutation(len(batches))].ravel().tolist()
        yield from order[whole:].tolist()


class PackedRows(RowSet):
    """A data set of packs: whole rows joined to at most ``pack_length`` tokens.

    Args:
        rows: The rows to pack, each of at most ``pack_length`` tokens.
        pack_length: The capacity of a pack, in tokens.
    """

    def __init__(self, rows: RowSet, pack_length: int) -> None:
        self.rows, self.packs = rows, pack(rows.lengths, pack_length)
        self.lengths = np.array([rows.lengths[p].sum() for p in self.packs])

    def __getitem__(self, index: int) -> Item:
        return join([self.rows[i] for i in self.packs[index]])


def pack(lengths: Sequence[int] | np.ndarray[Any, Any], pack_length: int) -> list[list[int]]:
    """Distribute rows among packs by best-fit decreasing: longest row first, into the fullest pack with enough room.

    Args:
        lengths: The number of tokens of each row, from 1 to ``pack_length``.
        pack_length: The capacity of a pack, in tokens.
    Returns:
        The packs as lists of row indices; every row is in exactly one.
    Raises:
        ValueError: If a row is longer than a pack.
    Source: D. S. Johnson, "Near-optimal bin packing algorithms", MIT 1973 (at most 11/9 of the optimum, plus one).
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > pack_length:
        raise ValueError(f"row {int(lengths.argmax())} has {int(lengths.max())} tokens, a pack holds {pack_length}")
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room left -> packs with that much room
    rooms: list[int] = []  # the keys of open_packs, sorted
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            target, room = len(packs), pack_length
            packs.append([])
        else:
            room = rooms[at]
            target = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[at]
        packs[target].append(row)
        room -= length
        if room and room not in open_packs:
            bisect.insort(rooms, room)
        if room:
            open_packs.setdefault(room, []).append(target)
    return packs


def join(items: Sequence[Item]) -> Item:
    """Concatenate rows into one packed item, whose position ids restart at each row."""
    positions = [item.get("position_ids", range(len(item["input_ids"]))) for item in items]
    return {
        "input_ids": np.concatenate([item["input_ids"] for item in items]),
        "labels": np.concatenate([item["labels"] for item in items]),
        "position_ids": np.concatenate([np.asarray(p) for p in positions]),
        "lines": [line for item in items for line in item["lines"]],
    }


class Collator:
    """Collates items into one batch of tensors.

    Packed items become a single row without an attention mask: the model then separates samples by their positions,
    and an all-ones mask would silently disable that. Other items are padded on the right, and masked by length and
    never by id, since the pad token ``<|endoftext|>`` may be a real target.

    Args:
        pad_id: The id that fills the slots after shorter rows.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Collate items.

        Args:
            items: The items, either all packed or none.
        Returns:
            The tensors of the batch. ``lines`` holds the lines of all items, for messages.
        """
        lines = torch.tensor([line for item in items for line in item["lines"]])
        if "position_ids" in items[0]:
            joined = join(items)
            fields = ("input_ids", "labels", "position_ids")
            return {name: torch.as_tensor(joined[name])[None] for name in fields} | {"lines": lines}
        shape = (len(items), max(len(item["input_ids"]) for item in items))
        input_ids, labels = torch.full(shape, self.pad_id), torch.full(shape, IGNORED)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for i, item in enumerate(items):
            length = len(item["input_ids"])
            input_ids[i, :length] = torch.as_tensor(item["input_ids"])
            labels[i, :length] = torch.as_tensor(item["labels"])
            attention_mask[i, :length] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask, "lines": lines}
