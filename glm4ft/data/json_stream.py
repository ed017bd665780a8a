"""JSON documents read value by value, so that an array of any length needs the memory of its longest element."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from glm4ft.data.json_values import STRICT
from glm4ft.data.messages import is_message
from glm4ft.errors import DataError, Location

_CHUNK = 2**18
_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = len("-Infinity")


class JsonStream:
    """The values of a file that is a JSON array, or several JSON values one after the other.

    Args:
        file: The file, open for reading bytes.
        name: Its path, for errors.
        begun: Bytes that were read from it already.
    """

    def __init__(self, file: BinaryIO, name: str, begun: bytes = b"") -> None:
        self._file, self._name, self._begun = file, name, begun
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._lines, self._is_over = "", 0, 1, False
        self._kept: int | None = None  # where to come back to
        self.record = 0

    def records(self) -> Iterator[tuple[Location, Any]]:
        """Yield the records: the elements of an array, or whole values where a value is itself a conversation."""
        while self._peek():
            if self._peek() == "[" and not self._holds_messages():
                yield from self._elements()
            else:
                yield self._next()

    def _elements(self) -> Iterator[tuple[Location, Any]]:
        self._at += 1
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            yield self._next()
            mark = self._peek()
            self._at += 1
            if mark == "]":
                return
            if mark != ",":
                self._at -= bool(mark)
                problem = "is malformed" if mark else "ends before its closing bracket: the file looks truncated"
                raise self._wrong(
                    f"after record {self.record} this JSON array {problem}", "a comma or a closing bracket"
                )

    def _holds_messages(self) -> bool:
        """Whether the list that begins here is one conversation: a list of messages."""
        self._kept = self._at
        self._at += 1
        first = self._value() if self._peek() not in ("]", "") else None
        self._at, self._kept = self._kept, None
        return is_message(first)

    def _next(self) -> tuple[Location, Any]:
        value = self._value()
        self.record += 1
        return Location(self._name, self.record, unit="record"), value

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = STRICT.raw_decode(self._text, self._at)
            except RecursionError:
                raise self._wrong("a record is nested too deeply", "a few levels of objects and lists") from None
            except json.JSONDecodeError as error:
                # what is cut off at the end of the buffer may be whole with more of the file
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _LONGEST_WORD
                if is_cut and self._fill(max(_CHUNK, len(self._text) - self._at)):
                    continue
                self._at = error.pos
                cut = "; the file looks truncated" if is_cut else ""
                raise self._wrong(f"record {self.record + 1} is not JSON: {error.msg}{cut}", "JSON") from None
            except ValueError as error:
                problem = f"record {self.record + 1} is not strict JSON: {error}"
                raise self._wrong(problem, "JSON with unique keys and finite numbers") from None
            if end == len(self._text) and self._fill(_CHUNK):  # a number may go on
                continue
            self._at = end
            return value

    def _peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill(_CHUNK):
                return ""

    def _fill(self, size: int) -> bool:
        """Read on, and let go of what has been read; False at the end of the file."""
        if self._is_over:
            return False
        raw = self._begun or self._file.read(size)
        self._is_over, self._begun = not raw, b""
        read = self._at if self._kept is None else self._kept
        self._lines += self._text.count("\n", 0, read)
        try:
            self._text = self._text[read:] + self._decoder.decode(raw, final=self._is_over)
        except UnicodeDecodeError as error:
            around = error.object[max(0, error.start - 8) : error.start + 8]
            raise Location(self._name, self._lines).wrong("the file is not UTF-8", around, "UTF-8 text") from None
        self._at, self._kept = self._at - read, None if self._kept is None else 0
        return bool(raw) or bool(self._text)

    def _wrong(self, problem: str, expected: str) -> DataError:
        line = self._lines + self._text.count("\n", 0, self._at)
        around = self._text[max(0, self._at - 30) : self._at + 30]
        fix = "write the file again, or correct it at this line"
        return Location(self._name, line).wrong(problem, around, expected, fix)
