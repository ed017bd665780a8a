"""Rows as a run trained them: ids and labels, and the turn of each token, read from the control tokens alone.

The roles come from the ids and not from the conversation, so that they can be told for the rows of any trainer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from glm4ft.data.batching import RowSet
from glm4ft.data.control_tokens import END_OF_TEXT, HEADERS, PREFIX
from glm4ft.errors import DataError
from glm4ft.files import write_atomically
from glm4ft.reading import json_lines, validated

TokenPart = Literal["prefix", "header", "body", "terminator"]
ROWS_FILE = "rows.jsonl"
_KIND = "an encoded row"
KEPT_TOKENS = 200_000  # of a run's rows: what explain and a report look at


class RowRecord(BaseModel):
    """A row in a file, as ``glm4ft inspect --json`` writes it; other fields are passed over."""

    line: Annotated[int, Field(ge=0)]
    input_ids: list[Annotated[int, Field(ge=0, lt=2**31)]]
    labels: list[Annotated[int, Field(ge=-100, lt=2**31)]]


@dataclass(frozen=True)
class TrainedRow:
    """One row as the run trained it.

    Args:
        line: The line of the conversation in its file, from 1; 0 if unknown.
        input_ids: The token ids of the row.
        labels: The labels, unshifted; -100 where a token was not supervised.
    """

    line: int
    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class TokenOrigin:
    """The turn and the part of it that a token belongs to.

    Args:
        role: The role that acts; a terminator is the assistant's, whose turn it ends; "" for the prefix and whatever
            belongs to no turn.
        part: The part of the turn: ``prefix``, ``header``, ``body`` or ``terminator``.
        turn: The number of the assistant turn, from 0; None elsewhere. The header belongs to its turn.
    """

    role: str
    part: TokenPart
    turn: int | None


def token_origins(input_ids: Sequence[int], control_ids: Mapping[str, int]) -> list[TokenOrigin]:
    """Find the turn and part of each token of a row.

    Args:
        input_ids: The token ids of the row.
        control_ids: Control tokens mapped to their ids.
    Returns:
        One origin per token.
    """
    headers = {control_ids[token]: role for role, token in HEADERS.items() if token in control_ids}
    outside = {control_ids[token] for token in PREFIX if token in control_ids}
    end_of_text = control_ids.get(END_OF_TEXT)
    found, role, turn, num_turns = [], "", -1, 0
    for token in input_ids:
        is_boundary = token in headers or token == end_of_text
        if is_boundary and role == "assistant":
            found.append(TokenOrigin("assistant", "terminator", turn))
            role, num_turns = headers.get(token, ""), num_turns + (headers.get(token) == "assistant")
            turn = num_turns - 1
        elif token in headers:
            role, num_turns = headers[token], num_turns + (headers[token] == "assistant")
            turn = num_turns - 1
            found.append(TokenOrigin(role, "header", turn if role == "assistant" else None))
        elif token in outside or not role:
            found.append(TokenOrigin("", "prefix", None))
        else:
            found.append(TokenOrigin(role, "body", turn if role == "assistant" else None))
    return found


def rows_of(rows: RowSet) -> Iterator[TrainedRow]:
    """The rows of a data set."""
    for index in range(len(rows)):
        item = rows[index]
        yield TrainedRow(item["lines"][0], item["input_ids"].tolist(), item["labels"].tolist())


def write_rows(path: Path, rows: Iterable[TrainedRow]) -> None:
    """Keep the first rows of a run beside its results, in the form of ``glm4ft inspect --json``."""
    kept: list[str] = []
    num_tokens = 0
    for index, row in enumerate(rows):
        num_tokens += len(row.input_ids)
        if kept and num_tokens > KEPT_TOKENS:
            break
        record = {"index": index, "line": row.line, "input_ids": row.input_ids, "labels": row.labels}
        kept.append(json.dumps({"schema": 1, **record}) + "\n")
    write_atomically(path, "".join(kept))


def read_rows(path: Path) -> list[TrainedRow]:
    """Rows as ``write_rows`` or ``glm4ft inspect --json`` wrote them; dropped conversations are passed over.

    Raises:
        DataError: If a line is no row.
    """
    expected = "line, input_ids and as many labels, as glm4ft inspect --json writes them"
    rows = []
    for where, record in json_lines(path, DataError, "cannot read the encoded rows", kind=_KIND):
        if "dropped" not in record:
            row = validated(RowRecord, record, where=where, error=DataError, kind=_KIND, fix=f"write {expected}")
            if len(row.input_ids) != len(row.labels):
                found = f"{len(row.input_ids)} input_ids and {len(row.labels)} labels"
                raise DataError("not an encoded row", where=where, found=found, expected=expected)
            rows.append(TrainedRow(row.line, row.input_ids, row.labels))
    return rows
