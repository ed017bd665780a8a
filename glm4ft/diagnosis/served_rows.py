"""The conversations of a run as they should be encoded, which its rows as trained are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.encoded_rows import KEPT_TOKENS, TrainedRow
from glm4ft.data.encoding import encoded_conversations
from glm4ft.data.inputs import data_inputs
from glm4ft.data.read_options import ReadOptions, columns_of
from glm4ft.diagnosis.run_files import RunFiles
from glm4ft.train.config import TrainConfig


@dataclass(frozen=True)
class Served:
    """Conversations as they should be encoded.

    Args:
        rows: The rows that are looked at.
        num_rows: The number of rows of the whole file.
        num_dropped: The number of conversations without a row.
        num_cut: The number of conversations that lost their oldest turns.
    """

    rows: list[TrainedRow] = field(default_factory=list)
    num_rows: int = 0
    num_dropped: int = 0
    num_cut: int = 0


def served_rows(files: RunFiles, data: str | None, encoder: ChatFormat, wanted: set[int]) -> Served:
    """The conversations as they should be encoded, and how many were dropped and cut.

    All are counted. Kept are the wanted lines, and the first ones, as many as are looked at: the rest of a large file
    would not fit into memory.

    Args:
        files: The files of the run.
        data: The file of conversations; by default the one that the run names.
        encoder: The chat format.
        wanted: The lines of the rows as trained.
    """
    max_length = int(files.config.get("max_length") or TrainConfig().max_length)
    rows, num_rows, dropped, cut, num_tokens = list[TrainedRow](), 0, 0, 0, 0
    inputs = data_inputs(data or files.config["data"])
    for outcome in encoded_conversations(inputs, encoder, max_length, _reading(files)):
        conversation, row = outcome.conversation, outcome.row
        if conversation is None or row is None:
            dropped += 1
            continue
        cut += len(row.turns) < encoder.num_turns(conversation)
        num_rows, num_tokens = num_rows + 1, num_tokens + len(row.input_ids)
        if not rows or num_tokens <= KEPT_TOKENS or row.line in wanted:
            rows.append(TrainedRow(row.line, row.input_ids, row.labels))
    return Served(rows, num_rows, dropped, cut)


def encoding_options(files: RunFiles) -> dict[str, Any]:
    """The options of one of our runs that decide how it was encoded.

    Args:
        files: The files of the run.
    """
    options = ("final_stop", "train_on", "allow_nonstop_terminator", "reasoning")
    return {key: files.config[key] for key in options if key in files.config}


def _reading(files: RunFiles) -> ReadOptions:
    """How one of our runs read its conversations."""
    options = {key: files.config[key] for key in ("calls_in_content", "on_error") if key in files.config}
    return ReadOptions(columns_of(files.config.get("columns")), **options)
