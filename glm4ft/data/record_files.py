"""Files of records in every format that is read: JSONL, JSON arrays, CSV, compressed, columnar, and data sets."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from glm4ft.data import columnar
from glm4ft.data.file_kinds import COLUMNAR, CONVERTED, kind_of, refuse_encoding, refuse_kind
from glm4ft.data.inputs import is_set
from glm4ft.data.json_stream import JsonStream
from glm4ft.data.json_values import strict_json
from glm4ft.errors import DataError, Location

Records = Iterator[tuple[Location, Any]]
_HEAD = 8192
_OPENERS: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_records(name: str) -> Records:
    """Read the records of a file or data set lazily; the file is opened when the first is requested.

    Args:
        name: A path, or the id of a data set of the hub.
    Yields:
        The place and the value of each record; in place of the value the error, if the record cannot be decoded.
    Raises:
        DataError: If the file cannot be read, or not further.
    """
    if is_set(name):
        yield from columnar.read_set(name)
        return
    try:
        with open(name, "rb") as file:
            yield from _from_open(file, name, name)
    except (OSError, EOFError, ValueError, csv.Error, lzma.LZMAError) as error:
        if isinstance(error, UnicodeDecodeError):
            around = error.object[max(0, error.start - 8) : error.start + 8]
            raise Location(name).wrong("the file is not UTF-8", around, "UTF-8 text", "convert it with iconv") from None
        reason = getattr(error, "strerror", None) or str(error)
        raise Location(name).wrong(f"a file cannot be read: {reason}", name, "a file that can be read") from None


def _from_open(file: BinaryIO, name: str, shown: str) -> Records:
    """Read an open file by what its first bytes say; ``name`` lacks the suffix of a compression."""
    head = cast(io.BufferedReader, file).peek(_HEAD)[:_HEAD]
    kind, suffix = kind_of(head), os.path.splitext(name)[1].lower()
    if kind in _OPENERS:
        with _OPENERS[kind](file) as inner:
            yield from _from_open(io.BufferedReader(inner), name.removesuffix(suffix), shown)
    elif kind in COLUMNAR:
        yield from columnar.read_file(kind, shown)
    elif kind in CONVERTED:
        raise refuse_kind(kind, shown)
    elif suffix in _DELIMITERS:
        yield from _from_csv(file, shown, _DELIMITERS[suffix])
    elif head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from JsonStream(file, shown).records()
    else:
        yield from _from_lines(file, shown)


def _from_lines(file: BinaryIO, name: str) -> Records:
    """Read JSONL; a file whose first record goes over several lines is read as JSON values one after the other."""
    offset, is_first = 0, True
    for line, raw in enumerate(file, 1):
        place = Location(name, line)
        mark = len(codecs.BOM_UTF8) if line == 1 and raw.startswith(codecs.BOM_UTF8) else 0
        text, at, offset = raw[mark:], offset + mark, offset + len(raw)
        if not text.strip():
            continue
        try:
            if is_first and _goes_on(text):
                yield from JsonStream(file, name, begun=raw).records()
                return
            is_first = False
            record = _decode(text, place, at)
        except DataError as error:
            record = error
        yield place, record


def _goes_on(text: bytes) -> bool:
    """Whether a line is the beginning of a JSON value that goes on in the next line."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return text.endswith(b"\n") and error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def _decode(raw: bytes, place: Location, offset: int) -> Any:
    """Decode one line of JSONL."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse_encoding(raw, error, place, offset) from None
    try:
        return strict_json(text)
    except RecursionError:
        raise place.wrong("a line is nested too deeply", text, "a few levels of objects and lists") from None
    except json.JSONDecodeError as error:
        raise _malformed(error, place, is_cut=not raw.endswith(b"\n")) from None
    except ValueError as error:
        expected = "JSON with unique keys and finite numbers"
        raise place.wrong(f"a line is not strict JSON: {error}", text, expected) from None


def _malformed(error: json.JSONDecodeError, place: Location, *, is_cut: bool) -> DataError:
    around = error.doc[max(0, error.pos - 30) : error.pos + 30]
    problem, fix = f"a line is not JSON at column {error.colno}: {error.msg}", "write one JSON object per line"
    if "BOM" in error.msg:
        problem = "a second byte order mark (BOM) begins this line, as in files that were joined"
        fix = rf"remove the marks: sed -i 's/^\xef\xbb\xbf//' {place.path}"
    elif is_cut:
        problem, fix = f"{problem}; the file looks truncated", "copy or write the file again, or remove its last line"
    elif error.pos == 1 and around.startswith("{'"):
        fix = "write JSON with double quotes, as json.dumps does; this is how Python prints a dict"
    return place.wrong(problem, around, "one JSON object on the line", fix)


def _from_csv(file: BinaryIO, name: str, delimiter: str) -> Records:
    """Read CSV or TSV; cells are text, verbatim, and an empty cell says nothing."""
    csv.field_size_limit(2**30)
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(rows, [])
        if len(header) == 1 and (other := next((d for d in (";", "\t", "|") if d in header[0]), "")):
            rows, header = csv.reader(text, delimiter=other, strict=True), header[0].split(other)
        if len(set(header)) < len(header):
            raise Location(name, 1).wrong("two columns have one name", header, "a name for each column")
        for number, cells in enumerate(rows, 1):
            place = Location(name, number, unit="record")
            if len(cells) == len(header):
                yield place, dict(zip(header, cells, strict=True))
            elif cells:
                fix = "quote cells that hold the delimiter or a line end"
                problem, found = "a row has another number of cells than the header", f"{len(cells)} cells"
                yield place, place.wrong(problem, found, f"{len(header)}", fix)
    finally:
        text.detach()
