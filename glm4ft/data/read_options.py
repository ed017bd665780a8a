"""How conversations are read from records, as far as the user decides it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from glm4ft.data.json_values import is_array
from glm4ft.data.known_keys import SYSTEM_KEYS, TOOL_KEYS
from glm4ft.data.sources import SHAPE_KEYS, SHAPES
from glm4ft.errors import ConfigError, Location

OnError = Literal["stop", "skip"]
_MESSAGE_COLUMNS = ("role", "content", "loss", "metadata", "tool_calls")
_OPTIONAL = frozenset((*SYSTEM_KEYS, *TOOL_KEYS, *(key for shape in SHAPES for key in shape.optional)))
_RECORD_COLUMNS = SHAPE_KEYS | _OPTIONAL


@dataclass(frozen=True)
class ReadOptions:
    """What the user says about records that their shape does not.

    Args:
        columns: Our names of keys mapped to those of the records. ``role``, ``content``, ``loss``, ``metadata`` and
            ``tool_calls`` are keys of messages, all others keys of records.
        calls_in_content: Whether a call that is written into an answer's text is read as a call; else it is refused.
        on_error: Whether conversations that cannot be used end the reading, once all are read, or are skipped.
    Raises:
        ConfigError: If a column is not one of ours.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    calls_in_content: bool = False
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in _RECORD_COLUMNS and name not in _MESSAGE_COLUMNS:
                known = [*SHAPE_KEYS, *_OPTIONAL, *_MESSAGE_COLUMNS]
                near = difflib.get_close_matches(name, known, n=1)
                expected = near[0] if near else "prompt, completion, messages, system, tools, role, content, ..."
                raise ConfigError(
                    "a column of no shape is named",
                    where="--columns",
                    found=name,
                    expected=expected,
                    fix="write the name here before the name in the file: prompt=question,completion=answer",
                )

    @property
    def named(self) -> frozenset[str]:
        """The keys of records that make up a shape and that the user named."""
        return frozenset(name for name in self.columns if name in SHAPE_KEYS)

    def renamed(self, record: Any, place: Location) -> Any:
        """A record with our names of its keys.

        Args:
            record: The record, as decoded.
            place: Its place in the file.
        Raises:
            DataError: If a named column is not there.
        """
        if not self.columns or not isinstance(record, Mapping):
            return record
        ours = {name: key for name, key in self.columns.items() if name in _RECORD_COLUMNS}
        for name, key in ours.items():
            if key not in record and name not in _OPTIONAL:
                raise place.wrong(
                    "a record lacks a column that --columns names", list(record), key, "correct --columns"
                )
        theirs = set(ours.values())
        kept = {f"{key} (not --columns)" if key in ours else key: record[key] for key in record if key not in theirs}
        result = {**kept, **{name: record[key] for name, key in ours.items() if key in record}}
        of_messages = {key: name for name, key in self.columns.items() if name in _MESSAGE_COLUMNS}
        return {key: _renamed_messages(value, of_messages) for key, value in result.items()} if of_messages else result


AS_IS = ReadOptions()


def columns_of(text: str | Mapping[str, str] | None) -> dict[str, str]:
    """The columns as an option gives them: ``prompt=content,completion=summary``, or a mapping in a file.

    Raises:
        ConfigError: If the text is written otherwise.
    """
    if text is None or isinstance(text, Mapping):
        return dict(text or {})
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and key.strip() for name, _, key in pairs):
        expected = "prompt=content,completion=summary: our names, each with that of the file"
        raise ConfigError("columns are written otherwise", where="--columns", found=text, expected=expected)
    return {name.strip(): key.strip() for name, _, key in pairs}


def _renamed_messages(value: Any, names: Mapping[str, str]) -> Any:
    if not is_array(value):
        return value
    return [{names.get(k, k): v for k, v in item.items()} if isinstance(item, Mapping) else item for item in value]
