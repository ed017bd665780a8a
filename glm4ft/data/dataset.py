"""Conversation files into rows on disk: encoded, cut to length, filtered, counted, and read back by memory map."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import glm4ft
from glm4ft.data.batching import Item, RowSet
from glm4ft.data.cache import default_cache, find_or_write
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import IGNORED, AssistantTurn, EncodedRow
from glm4ft.errors import DataError

DEMO_DATA = Path(glm4ft.__file__).parent / "demo" / "two_conversations.jsonl"
WARNING_KINDS = 20  # counted apart: warnings quote names from the data
NO_TARGETS = "no supervised token"
TOO_LONG = "longer than max_length even with the last turn alone"
_REPORT = "report.json"
# Whatever changes a row or how it is stored is in one of these modules beside this one.
ENCODER_MODULES = (
    "sources", "known_keys", "reader", "conversation", "control_tokens", "turn_format", "render", "tool_block",
    "encoded_row", "chat_format", "dataset", "template_format", "formats",
)  # fmt: skip


@dataclass
class DataReport:
    """What became of the conversations of one file.

    Args:
        path: The file.
        conversations: The number of conversations read.
        rows: The number of encoded conversations kept.
        tokens: The number of tokens in all rows.
        supervised_tokens: The number of supervised tokens among them.
        dropped: Reasons mapped to the lines of the conversations dropped for them.
        truncated: The lines of the conversations that lost their oldest turns.
        warnings: Warnings mapped to the lines they apply to.
        damage: What was wrong with the rows in the cache, so that they were encoded again; "" if nothing was.
    """

    path: str
    conversations: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    truncated: list[int] = field(default_factory=list)
    warnings: dict[str, list[int]] = field(default_factory=dict)
    damage: str = ""

    def describe(self) -> str:
        """The report as text: one line of totals, then one line per thing worth a look."""
        share = f" ({self.supervised_tokens / self.tokens:.0%})" if self.tokens else ""
        lines = [
            f"{self.path}: {self.conversations:,} conversations, {self.rows:,} rows, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised{share}"
        ]
        lines += [f"  dropped, {reason}: {_list_lines(where)}" for reason, where in self.dropped.items()]
        if self.truncated:
            lines.append(f"  oldest turns cut to fit max_length: {_list_lines(self.truncated)}")
        lines += [f"  warning, {text}: {_list_lines(where)}" for text, where in self.warnings.items()]
        if self.damage:
            lines.append(f"  encoded again, since the rows in the cache were damaged: {self.damage}")
        return "\n".join(lines)


class Rows(RowSet):
    """Encoded rows of one file, read by memory map.

    Args:
        folder: The folder of the rows, as ``prepare_rows`` writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.input_ids = np.memmap(folder / "input_ids.int32", dtype=np.int32, mode="r")
        self.supervised = np.memmap(folder / "supervised.bool", dtype=np.bool_, mode="r")
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


def prepare_rows(
    path: str | os.PathLike[str], chat_format: ChatFormat, *, max_length: int, cache: Path | None = None
) -> tuple[Rows, DataReport]:
    """Encode a conversation file, or find the rows of an earlier run with the same input.

    Args:
        path: The JSONL file of conversations.
        chat_format: The encoder.
        max_length: The longest row, in tokens.
        cache: The folder of encoded files; by default ``$GLM4FT_CACHE`` or ``~/.cache/glm4ft``.
    Returns:
        The rows and the report.
    Raises:
        ConfigError: If the cache cannot be written.
        DataError: For the first conversation that cannot be used, or if no row is left.
    """
    digest = _file_digest(path)

    def write(folder: Path) -> None:
        _write_rows(folder, path, chat_format, max_length)
        if _file_digest(path) != digest:
            fix = "run the command again when nothing writes to the file"
            raise DataError("the file changed while it was being encoded", where=os.fspath(path), fix=fix)

    folder, problem = find_or_write(cache or default_cache(), _entry_name(digest, chat_format, max_length), write)
    report = DataReport(**json.loads((folder / _REPORT).read_text("utf-8")))
    return Rows(folder), replace(report, path=os.fspath(path), damage=problem)


def data_path(data: str) -> Path:
    """The file a ``data`` option stands for: ``demo`` is the bundled two conversations."""
    return DEMO_DATA if data == "demo" else Path(data)


def fit_row(conversation: Conversation, chat_format: ChatFormat, max_length: int) -> tuple[EncodedRow | None, str]:
    """Encode a conversation, without its oldest exchanges if it would not fit otherwise.

    Prefix, tools, system messages and the last assistant turn with its question stay; nothing is cut on the right, so
    no stop token is lost and none has to be invented.

    Args:
        conversation: The conversation to encode.
        chat_format: The encoder.
        max_length: The longest row, in tokens.
    Returns:
        ``(row, "")``, or ``(None, reason)`` if the row has to be dropped. A row shorter than its conversation has
        fewer turns.
    """
    row = chat_format.encode(conversation)
    kept = conversation
    if len(row.input_ids) > max_length:
        excess, dropped = len(row.input_ids) - max_length, set[int]()
        for exchange in _exchanges(conversation.messages)[:-1]:
            if excess <= 0:
                break
            excess -= sum(s.end - s.start for s in row.segments if s.message in exchange)
            dropped |= exchange
        if excess > 0:
            return None, TOO_LONG
        kept = replace(conversation, messages=tuple(m for i, m in enumerate(kept.messages) if i not in dropped))
        row = chat_format.encode(kept)
    return (row, "") if any(row.supervised) else (None, NO_TARGETS)


def _exchanges(messages: tuple[Message, ...]) -> list[set[int]]:
    """Indices of the messages in groups, each from a question to the last assistant turn that answers it.

    System messages are in no group. What follows the last assistant turn belongs to the last group.
    """
    groups: list[set[int]] = [set()]
    has_answer = False
    last_answer = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    for i, message in enumerate(messages):
        if message.role == "system":
            continue
        if message.role == "user" and has_answer and i < last_answer:
            groups.append(set())
            has_answer = False
        groups[-1].add(i)
        has_answer = has_answer or message.role == "assistant"
    return groups


def _write_rows(folder: Path, path: str | os.PathLike[str], chat_format: ChatFormat, max_length: int) -> None:
    report, offsets, lines, turns, turn_offsets = DataReport(os.fspath(path)), [0], [], list[tuple[int, ...]](), [0]
    with open(folder / "input_ids.int32", "wb") as ids_file, open(folder / "supervised.bool", "wb") as mask_file:
        for conversation in _with_progress(_read_conversations(path)):
            report.conversations += 1
            for warning in chat_format.warnings(conversation):
                # without the message's index, or a large file would have a kind of warning on every line
                kind = re.sub(r"\[\d+\]", "[*]", warning)
                if kind not in report.warnings and len(report.warnings) >= WARNING_KINDS:
                    kind = "other warnings"
                report.warnings.setdefault(kind, []).append(conversation.line)
            row, reason = fit_row(conversation, chat_format, max_length)
            if row is None:
                report.dropped.setdefault(reason, []).append(conversation.line)
                continue
            if len(row.turns) < chat_format.num_turns(conversation):
                report.truncated.append(conversation.line)
            ids_file.write(np.asarray(row.input_ids, dtype=np.int32).tobytes())
            mask_file.write(np.asarray(row.supervised, dtype=np.bool_).tobytes())
            offsets.append(offsets[-1] + len(row.input_ids))
            lines.append(conversation.line)
            turns += [(turn.message, turn.start, turn.end, turn.supervised) for turn in row.turns]
            turn_offsets.append(len(turns))
            report.supervised_tokens += sum(row.supervised)
    report.rows, report.tokens = len(lines), offsets[-1]
    if not lines:
        reasons = "; ".join(f"{reason}: {_list_lines(where)}" for reason, where in report.dropped.items())
        raise DataError(
            "no conversation is left to train on",
            where=os.fspath(path),
            found=reasons,
            fix="raise --max_length, or check the conversations' loss flags with glm4ft inspect",
        )
    np.save(folder / "offsets.npy", np.asarray(offsets, dtype=np.int64))
    np.save(folder / "lines.npy", np.asarray(lines, dtype=np.int64))
    np.save(folder / "turns.npy", np.asarray(turns, dtype=np.int64).reshape(-1, 4))
    np.save(folder / "turn_offsets.npy", np.asarray(turn_offsets, dtype=np.int64))
    (folder / _REPORT).write_text(json.dumps(asdict(report), ensure_ascii=False), "utf-8")


def _read_conversations(path: str | os.PathLike[str]) -> Iterator[Conversation]:
    from glm4ft.data.reader import read_conversations  # a run whose rows are in the cache loads no reader of files

    return read_conversations(path)


def _with_progress(conversations: Iterator[Conversation]) -> Iterator[Conversation]:
    # delay: short work shows no bar; disable=None: no bar where stderr is not a terminal
    return iter(tqdm(conversations, desc="encoding", unit=" conversations", delay=2, disable=None, leave=False))


def _entry_name(file: FileDigest, chat_format: ChatFormat, max_length: int) -> str:
    """Name of the cache entry: a digest of everything that the rows depend on, and of nothing else."""
    digest = hashlib.sha256(file.sha256)
    options: dict[str, Any] = {
        "code": code_digest(),
        "encoder": f"{type(chat_format).__module__}.{type(chat_format).__qualname__}",
        "format": chat_format.name,
        "final_stop": chat_format.final_stop,
        "train_on": chat_format.train_on,
        "allow_nonstop_terminator": chat_format.allow_nonstop_terminator,
        "reasoning": chat_format.reasoning,
        "max_length": max_length,
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
class FileDigest:
    """The content of a file, and when it was written: a file that was cut and restored meanwhile is not the same."""

    sha256: bytes
    modified_ns: int


def _file_digest(path: str | os.PathLike[str]) -> FileDigest:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            fix = "write it to a file first"
            raise DataError("this is not a file: it can be read only once", where=os.fspath(path), fix=fix)
        with open(path, "rb") as file:
            modified_ns = os.fstat(file.fileno()).st_mtime_ns
            return FileDigest(hashlib.file_digest(file, "sha256").digest(), modified_ns)
    except (OSError, ValueError):
        # read_conversations says what is wrong with the path, in full
        next(_read_conversations(path))
        raise


def _list_lines(lines: list[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:10])
    return f"{len(lines):,} (line{'s' if len(lines) > 1 else ''} {shown}{', ...' if len(lines) > 10 else ''})"
