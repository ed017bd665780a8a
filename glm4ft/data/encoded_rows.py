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
from transformers import PreTrainedTokenizerBase

from glm4ft.data.batching import RowSet
from glm4ft.data.control_tokens import END_OF_TEXT, HEADERS, PREFIX
from glm4ft.data.template_format import TemplateFormat
from glm4ft.data.turn_format import TEMPLATE
from glm4ft.errors import DataError, ModelError
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


@dataclass(frozen=True)
class TurnMarkers:
    """The ids by which a row is split into turns.

    Args:
        headers: The ids that begin a message, mapped to its role; one id in the GLM-4 family, several in ChatML.
        prefix: The ids that belong to no message.
        ends: The ids that end an assistant turn.
    """

    headers: Mapping[tuple[int, ...], str]
    prefix: frozenset[int] = frozenset()
    ends: frozenset[int] = frozenset()

    def header_at(self, input_ids: Sequence[int], at: int) -> tuple[int, ...]:
        """The header that begins at a position; empty if none does."""
        found = (header for header in self.headers if tuple(input_ids[at : at + len(header)]) == header)
        return max(found, key=len, default=())


def turn_markers(tokenizer: PreTrainedTokenizerBase) -> TurnMarkers:
    """The ids that a tokenizer's rows are split by: GLM-4's control tokens, or what its chat template writes.

    Args:
        tokenizer: A tokenizer; without either, every token belongs to no turn.
    """
    ids = tokenizer.get_added_vocab()
    if HEADERS["assistant"] in ids:
        headers: dict[tuple[int, ...], str] = {(ids[token],): role for role, token in HEADERS.items() if token in ids}
        ends = [ids[token] for token in (*HEADERS.values(), END_OF_TEXT) if token in ids]
        return TurnMarkers(headers, frozenset(ids[t] for t in PREFIX if t in ids), frozenset(ends))
    try:
        written = TemplateFormat(TEMPLATE, tokenizer)
    except ModelError:
        return TurnMarkers({})
    return TurnMarkers({header: role for role, header in written.headers.items()}, ends=frozenset(written.stop_ids))


def token_origins(input_ids: Sequence[int], markers: TurnMarkers) -> list[TokenOrigin]:
    """Find the turn and part of each token of a row.

    Args:
        input_ids: The token ids of the row.
        markers: The ids that begin and end turns.
    Returns:
        One origin per token.
    """
    firsts = {header[0] for header in markers.headers}
    found, role, turn, num_turns = list[TokenOrigin](), "", -1, 0
    while len(found) < len(input_ids):
        token = input_ids[len(found)]
        header = markers.header_at(input_ids, len(found)) if token in firsts else ()
        if role == "assistant" and token in markers.ends:
            found.append(TokenOrigin("assistant", "terminator", turn))
            # in the GLM-4 family the token that ends a turn is the next one's header
            role = markers.headers[header] if len(header) == 1 else ""
            num_turns += role == "assistant"
            turn = num_turns - 1
        elif header:
            role = markers.headers[header]
            num_turns += role == "assistant"
            turn = num_turns - 1
            found += [TokenOrigin(role, "header", turn if role == "assistant" else None)] * len(header)
        elif token in markers.prefix or not role:
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
