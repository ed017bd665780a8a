"""Conversation files into rows on disk: encoded, cut to length, filtered and counted, once for each file."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from tqdm import tqdm

from glm4ft.data.cache import default_cache, find_or_write
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.data_report import DataReport, list_lines
from glm4ft.data.inputs import DataInput, DataNames, data_inputs
from glm4ft.data.read_options import AS_IS, ReadOptions
from glm4ft.data.stored_rows import JoinedRows, Rows, RowsWriter, repeats
from glm4ft.errors import DataError

if TYPE_CHECKING:
    from glm4ft.data.refusals import Refusals

_REPORT = "report.json"
# Whatever changes a row or how it is stored is in one of these modules beside this one.
ENCODER_MODULES = (
    "record_files", "file_kinds", "json_stream", "columnar", "inputs", "json_values", "read_options", "refusals",
    "sources", "known_keys", "messages", "source_message", "tool_calls", "written_calls", "call_binding",
    "foreign_text", "reader", "conversation", "control_tokens", "turn_format", "render", "tool_block", "time_limit",
    "encoded_row", "chat_format", "template_format", "template_rendering", "formats", "encoding", "portions",
    "stored_rows", "data_report", "dataset",
)  # fmt: skip


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
    times = repeats(one, len(rows))
    supervised = np.add.reduceat(rows.supervised, rows.offsets[:-1], dtype=np.int64)
    tokens, targets = int(times @ rows.lengths), int(times @ supervised)
    return replace(report, rows=int(times.sum()), tokens=tokens, supervised_tokens=targets)


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
        with RowsWriter(folder) as writer, _progress_bar(one) as bar:
            for portion in Portions(one, self.chat_format, self.max_length, self.options).in_order():
                bar.update(portion.refusals.read)
                self.refusals.extend(portion.refusals)
                if portion.fatal:
                    raise portion.fatal
                if not self.refusals.will_stop:
                    report.extend(portion.report)
                    writer.write(portion)
        require_records(one.name, self.refusals.read - read_before)
        (folder / _REPORT).write_text(json.dumps(asdict(report)), "utf-8")
        if self.refusals.will_stop:
            raise _NotKept
        if _content(one) != content:
            fix = "run the command again when nothing writes to the file"
            raise DataError("the file changed while it was being encoded", where=one.name, fix=fix)


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
