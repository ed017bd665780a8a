"""The rows of a large file, encoded on all cores: portion by portion, in the order of the file."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.data_report import DataReport
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.data.encoding import encode
from glm4ft.data.inputs import DataInput
from glm4ft.data.read_options import ReadOptions
from glm4ft.data.reader import parse_records
from glm4ft.data.record_files import read_records
from glm4ft.data.refusals import Refusals
from glm4ft.errors import DataError, InputError

RECORDS = 256  # of a portion: some 1 MB of chats, so that a portion is neither all memory nor all overhead
# Smaller files are encoded before processes for it have begun: some 2 seconds of work for one core.
MIN_BYTES = 2**22
MAX_PROCESSES = 16  # each of them reads the whole file, which takes 3 % of the time of encoding it


@dataclass
class Portion:
    """Consecutive records of a file, encoded.

    Args:
        report: What became of them; ``last`` and ``unit`` are those of the last one.
        input_ids: The ids of all rows, one after the other.
        supervised: For each id, whether it is a target.
        lengths: The length of each row.
        lines: The line of each row.
        turns: For each assistant turn its message, its span in its row, and whether it is supervised.
        num_turns: The number of turns of each row.
        refusals: The records that cannot be used.
        fatal: The reason why the file cannot be encoded further, or None.
    """

    report: DataReport
    input_ids: np.ndarray[Any, Any]
    supervised: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    lines: np.ndarray[Any, Any]
    turns: np.ndarray[Any, Any]
    num_turns: np.ndarray[Any, Any]
    refusals: Refusals
    fatal: InputError | None


class Portions(IterableDataset[Portion]):
    """The portions of a file; each process of a ``DataLoader`` encodes its share of them, in turn.

    Args:
        one: The file or data set.
        chat_format: The encoder.
        max_length: The longest row, in tokens.
        options: How conversations are read.
    """

    def __init__(self, one: DataInput, chat_format: ChatFormat, max_length: int, options: ReadOptions) -> None:
        self.one, self.chat_format, self.max_length, self.options = one, chat_format, max_length, options

    def in_order(self) -> Iterator[Portion]:
        """All portions in the order of the file, on as many cores as are worth it."""
        # its own generator: the loader would draw a seed from the global one, which training must not notice
        options: dict[str, Any] = {"batch_size": None, "collate_fn": _as_it_is, "generator": torch.Generator()}
        return iter(DataLoader(self, num_workers=_num_processes(self.one), **options))

    def __iter__(self) -> Iterator[Portion]:
        worker = get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        will_stop = False
        for records, fatal in itertools.islice(_records(self.one.name), number, None, step):
            portion = self._encode(records, will_stop=will_stop)
            portion.fatal = portion.fatal or fatal
            will_stop = portion.refusals.will_stop
            yield portion

    def _encode(self, records: list[Any], *, will_stop: bool) -> Portion:
        refusals, report = Refusals(self.options.on_error, will_stop=will_stop), DataReport(self.one.name)
        rows, fatal = list[EncodedRow](), None
        try:
            for outcome in encode(
                parse_records(iter(records), self.options, refusals), self.chat_format, self.max_length, refusals
            ):
                report.add(outcome)
                rows += [outcome.row] if outcome.row is not None else []
        except InputError as error:  # raised where all portions meet: on its way there it would lose its parts
            fatal = error
        turns = [(turn.message, turn.start, turn.end, turn.supervised) for row in rows for turn in row.turns]
        return Portion(
            report,
            _joined((row.input_ids for row in rows), np.int32),
            _joined((row.supervised for row in rows), np.bool_),
            np.asarray([len(row.input_ids) for row in rows], dtype=np.int64),
            np.asarray([row.line for row in rows], dtype=np.int64),
            np.asarray(turns, dtype=np.int64).reshape(-1, 4),
            np.asarray([len(row.turns) for row in rows], dtype=np.int64),
            refusals,
            fatal,
        )


def _records(name: str) -> Iterator[tuple[list[Any], DataError | None]]:
    """The records of a file in lists, the last with the reason why there are no more, if it is not the end."""
    taken = list[Any]()
    try:
        for record in read_records(name):
            taken.append(record)
            if len(taken) == RECORDS:
                yield taken, None
                taken = []
    except DataError as error:
        yield taken, error
        return
    if taken:
        yield taken, None


def _joined(parts: Iterable[Sequence[int]], dtype: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def _num_processes(one: DataInput) -> int:
    """How many processes encode a file beside this one; none where this one does it alone."""
    # forked, since the encoder cannot be sent: macOS and Windows have no fork that is safe
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    num_cores = len(os.sched_getaffinity(0)) if can_fork else 1
    if num_cores == 1 or not one.is_file or os.path.getsize(one.name) < MIN_BYTES:
        return 0
    return min(num_cores, MAX_PROCESSES)


def _as_it_is(portion: Portion) -> Portion:
    return portion
