"""Conversation files into rows on disk: encoded, cut to length, filtered, counted, and read back by memory map."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from tqdm import tqdm

from glm4ft.data.batching import Item, RowSet
from glm4ft.data.cache import default_cache, find_or_write
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.data_report import DataReport, list_lines
from glm4ft.data.encoded_row import IGNORED, AssistantTurn, EncodedRow
from glm4ft.data.inputs import DataInput, DataNames, data_inputs
from glm4ft.data.read_options import AS_IS, ReadOptions
from glm4ft.errors import DataError

if TYPE_CHECKING:
    from glm4ft.data.refusals import Refusals

_REPORT = "report.json"
# Whatever changes a row or how it is stored is in one of these modules beside this one.
ENCODER_MODULES = (
    "record_files", "file_kinds", "json_stream", "columnar", "inputs", "json_values", "read_options", "refusals",
    "sources", "known_keys", "messages", "source_message", "tool_calls", "written_calls", "call_binding",
    "foreign_text", "reader", "conversation", "control_tokens", "turn_format", "render", "tool_block", "time_limit",
    "encoded_row", "chat_format", "template_format", "formats", "encoding", "portions", "data_report", "dataset",
)  # fmt: skip


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
        copies = [_repeats(one, len(part)) for one, part in zip(inputs, parts, strict=True)]
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


def prepare_rows(
    data: DataNames,
    chat_format: ChatFormat,
    *,
    max_length: int,
    options: ReadOptions = AS_IS,
    cache: Path | None = None,
) -> tuple[Rows | JoinedRows, DataReport]:
    """Encode conversations, or find the rows of an earlier run with the same input.

    Args:
        data: What ``data_inputs`` takes: a file of conversations, or several.
        chat_format: The encoder.
        max_length: The longest row, in tokens.
        options: How conversations are read.
        cache: The folder of encoded files; by default ``$GLM4FT_CACHE`` or ``~/.cache/glm4ft``.
    Returns:
        The rows and the report.
    Raises:
        ConfigError: If the cache cannot be written.
        DataError: If a conversation cannot be used and is not to be skipped, or if no row is left.
    """
    inputs, encoder, found = data_inputs(data), _Encoder(chat_format, max_length, options), list[tuple[Path, str]]()
    for one in inputs:
        content = _content(one)
        name = _entry_name(one, content, chat_format, max_length, options)
        with contextlib.suppress(_NotKept):
            found.append(find_or_write(cache or default_cache(), name, functools.partial(encoder.write, one, content)))
    encoder.settle()
    parts, reports = [Rows(folder) for folder, _ in found], list[DataReport]()
    for (folder, damage), part, one in zip(found, parts, inputs, strict=True):
        report = DataReport(**json.loads((folder / _REPORT).read_text("utf-8")))
        reports.append(_weighted(replace(report, path=one.name, weight=one.weight, damage=damage), part, one))
    if not any(report.rows for report in reports):
        raise _nothing_left(reports)
    if len(parts) == 1:
        return parts[0] if inputs[0].weight == 1 else JoinedRows(parts, inputs, [0]), reports[0]
    offsets = [sum(report.last for report in reports[:number]) for number in range(len(reports))]
    return JoinedRows(parts, inputs, offsets), DataReport.of_parts(reports)


def _weighted(report: DataReport, rows: Rows, one: DataInput) -> DataReport:
    """The report, with rows and tokens counted as often as they are trained."""
    if one.weight == 1 or not len(rows):
        return report
    repeats = _repeats(one, len(rows))
    supervised = np.add.reduceat(rows.supervised, rows.offsets[:-1], dtype=np.int64)
    tokens, targets = int(repeats @ rows.lengths), int(repeats @ supervised)
    return replace(report, rows=int(repeats.sum()), tokens=tokens, supervised_tokens=targets)


def _repeats(one: DataInput, num_rows: int) -> np.ndarray[Any, Any]:
    """How often each row of an input is trained in an epoch."""
    return np.array([one.repeats(index) for index in range(num_rows)], dtype=np.int64)


def _nothing_left(reports: Sequence[DataReport]) -> DataError:
    left_out = [pair for report in reports for pair in (*report.unusable.items(), *report.dropped.items())]
    return DataError(
        "no conversation is left to train on",
        where=", ".join(report.path for report in reports),
        found="; ".join(f"{reason}: {list_lines(where)}" for reason, where in left_out) or "no row of this weight",
        fix="raise --max_length, or check the conversations' loss flags with glm4ft inspect",
    )


class _NotKept(Exception):
    """The rows are not to be kept, since the reading is bound to end in an error."""


class _Encoder:
    """Encodes inputs that are not in the cache; a run that finds all of its rows there loads no reader of files.

    Args:
        chat_format: The encoder.
        max_length: The longest row, in tokens.
        options: How conversations are read.
    """

    def __init__(self, chat_format: ChatFormat, max_length: int, options: ReadOptions) -> None:
        self.chat_format, self.max_length, self.options = chat_format, max_length, options
        self._refusals: Refusals | None = None

    @property
    def refusals(self) -> Refusals:
        """The conversations of all inputs that cannot be used."""
        if self._refusals is None:
            from glm4ft.data.refusals import Refusals

            self._refusals = Refusals(self.options.on_error)
        return self._refusals

    def settle(self) -> None:
        """Raise the errors of all inputs at once."""
        if self._refusals is not None:
            self._refusals.settle()

    def write(self, one: DataInput, content: Content, folder: Path) -> None:
        """Write the rows of an input into a folder.

        Raises:
            DataError: If the input changed meanwhile.
            _NotKept: If a conversation cannot be used and is not to be skipped.
        """
        from glm4ft.data.portions import Portions
        from glm4ft.data.reader import require_records

        report, read_before = DataReport(one.name), self.refusals.read
        kept: dict[str, list[Any]] = {"lengths": [], "lines": [], "turns": [], "num_turns": []}
        with (
            open(folder / "input_ids.int32", "wb") as ids_file,
            open(folder / "supervised.bool", "wb") as mask_file,
            _progress_bar(one) as bar,
        ):
            for portion in Portions(one, self.chat_format, self.max_length, self.options).in_order():
                bar.update(portion.refusals.read)
                self.refusals.extend(portion.refusals)
                if portion.fatal:
                    raise portion.fatal
                if self.refusals.will_stop:
                    continue
                report.extend(portion.report)
                ids_file.write(portion.input_ids.tobytes())
                mask_file.write(portion.supervised.tobytes())
                for name, arrays in kept.items():
                    arrays.append(getattr(portion, name))
        require_records(one.name, self.refusals.read - read_before)
        np.save(folder / "offsets.npy", _offsets(kept["lengths"]))
        np.save(folder / "lines.npy", _joined(kept["lines"]))
        np.save(folder / "turns.npy", _joined(kept["turns"], 4))
        np.save(folder / "turn_offsets.npy", _offsets(kept["num_turns"]))
        (folder / _REPORT).write_text(json.dumps(asdict(report)), "utf-8")
        if self.refusals.will_stop:
            raise _NotKept
        if _content(one) != content:
            fix = "run the command again when nothing writes to the file"
            raise DataError("the file changed while it was being encoded", where=one.name, fix=fix)


def _joined(arrays: Sequence[Any], *width: int) -> np.ndarray[Any, Any]:
    return np.concatenate([np.zeros((0, *width), np.int64), *arrays])


def _offsets(sizes: Sequence[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([[0], np.cumsum(_joined(sizes))])


def _mapped(path: Path, dtype: Any) -> np.ndarray[Any, Any]:
    # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _progress_bar(one: DataInput) -> tqdm[NoReturn]:
    total = None
    if one.name.endswith(".jsonl"):
        with open(one.name, "rb") as file:
            total = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))
    # delay: short work shows no bar; disable=None: no bar where stderr is not a terminal
    return tqdm(desc="encoding", total=total, unit=" conversations", delay=2, disable=None, leave=False)


def _entry_name(
    one: DataInput, content: Content, chat_format: ChatFormat, max_length: int, reading: ReadOptions
) -> str:
    """Name of the cache entry: a digest of everything that the rows depend on, and of nothing else."""
    digest = hashlib.sha256(content.sha256)
    options: dict[str, Any] = {
        "code": code_digest(),
        "encoder": f"{type(chat_format).__module__}.{type(chat_format).__qualname__}",
        "format": chat_format.name,
        "final_stop": chat_format.final_stop,
        "train_on": chat_format.train_on,
        "allow_nonstop_terminator": chat_format.allow_nonstop_terminator,
        "reasoning": chat_format.reasoning,
        "max_length": max_length,
        "suffixes": Path(one.name).suffixes if one.is_file else [],  # by which CSV is told from JSONL
        "reading": asdict(reading),
        "chat_template": chat_format.tokenizer.chat_template,
        "tokenizer": hashlib.sha256(chat_format.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    }
    digest.update(json.dumps(options, sort_keys=True).encode())
    return digest.hexdigest()[:32]


@functools.cache
def code_digest(package: Path = Path(__file__).parent) -> str:
    """Digest of the modules that decide what a row is: rows that other code encoded are not found again.

    Args:
        package: The folder of ``ENCODER_MODULES``.
    """
    digest = hashlib.sha256()
    for name in ENCODER_MODULES:
        digest.update((package / f"{name}.py").read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Content:
    """What an input holds, and when it was written: a file that was cut and restored meanwhile is not the same."""

    sha256: bytes
    modified_ns: int


def _content(one: DataInput) -> Content:
    if not one.is_file:
        from glm4ft.data.columnar import set_digest

        return Content(set_digest(one.name), 0)
    try:
        if not stat.S_ISREG(os.stat(one.name).st_mode):
            fix = "write it to a file first"
            raise DataError("this is not a file: it can be read only once", where=one.name, fix=fix)
        with open(one.name, "rb") as file:
            modified_ns = os.fstat(file.fileno()).st_mtime_ns
            return Content(hashlib.file_digest(file, "sha256").digest(), modified_ns)
    except (OSError, ValueError):
        from glm4ft.data.reader import read_conversations

        next(read_conversations(one.name))  # says what is wrong with the path, in full
        raise
