"""What a file is, told by its first bytes, and the command that makes of it what can be read.

Sources: the magic numbers in the specifications of gzip (RFC 1952), Parquet, Arrow IPC, zip, zstd (RFC 8878), HDF5,
SQLite and Git LFS.
"""

from __future__ import annotations

import codecs
import os
import shlex
from typing import NamedTuple

from glm4ft.errors import DataError, Location

COMPRESSED = ("gzip", "bzip2", "xz")  # decompressed while they are read
COLUMNAR = ("parquet", "arrow")  # read with datasets
_MAGIC = (
    (b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"), (b"PK\x03\x04", "zip"),
    (b"7z\xbc\xaf\x27\x1c", "7z"), (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"SQLite format 3\x00", "SQLite"),
    (b"Obj\x01", "Avro"), (b"ORC", "ORC"), (b"%PDF-", "PDF"), (b"\x80\x04\x95", "pickle"), (b"\x80\x05\x95", "pickle"),
    (b"version https://git-lfs.github.com/spec/", "Git LFS pointer"),
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip


class _Way(NamedTuple):
    """How a kind of file becomes one that can be read."""

    command: str
    suffix: str = ".jsonl"


_PANDAS = "python -c \"import pandas; pandas.{read}({{quoted}}).to_json({{made}}, orient='records', lines=True)\""
_WAYS = {
    "zstd": _Way("zstd -dc {file} > {out}", ""),
    "zip": _Way("unzip {file}", ""),
    "7z": _Way("7z x {file}", ""),
    "HDF5": _Way(_PANDAS.format(read="read_hdf")),
    "SQLite": _Way("sqlite3 -json {file} 'SELECT * FROM conversations' > {out}", ".json"),
    "Avro": _Way("fastavro --compact {file} > {out}"),
    "ORC": _Way(_PANDAS.format(read="read_orc")),
    "PDF": _Way("extract the conversations from it"),
    "pickle": _Way("write it as JSONL with the program that made it: a pickle can run any code when it is read"),
    "Git LFS pointer": _Way("git lfs pull --include {file}"),
    "UTF-32": _Way("iconv -f UTF-32 -t UTF-8 {file} > {out}"),
    "UTF-16": _Way("iconv -f UTF-16 -t UTF-8 {file} > {out}"),
    "UTF-16LE": _Way("iconv -f UTF-16LE -t UTF-8 {file} > {out}"),
    "UTF-16BE": _Way("iconv -f UTF-16BE -t UTF-8 {file} > {out}"),
    "CR line ends": _Way("tr '\\r' '\\n' < {file} > {out}"),
    "HTML page": _Way("download the file itself: on the hub with resolve, not blob, in its address"),
}  # fmt: skip
CONVERTED = tuple(_WAYS)


def kind_of(head: bytes) -> str:
    """Tell what a file is.

    Args:
        head: Its first bytes, a few thousand if it has as many.
    Returns:
        One of ``COMPRESSED``, ``COLUMNAR`` or ``CONVERTED``; "" for text that may well be JSON or CSV.
    """
    if found := next((kind for magic, kind in _MAGIC if head.startswith(magic)), ""):
        return found
    if head[1:2] == b"\0" and head[:1].isascii():  # UTF-16 without its mark
        return "UTF-16LE"
    if head[:1] == b"\0":
        return "UTF-16BE"
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:9].lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "HTML page"
    # between records, not within: JSON escapes the carriage returns of its strings
    return "CR line ends" if b"\r" in head and b"\n" not in head and b"}\r" in head else ""


def refuse_kind(kind: str, name: str) -> DataError:
    """The error of a file that has to be converted first, with the command.

    Args:
        kind: One of ``CONVERTED``.
        name: The path of the file.
    """
    way, stem = _WAYS[kind], os.path.splitext(os.path.basename(name))[0]
    out = f"{stem}-utf8.jsonl" if "iconv" in way.command else f"{stem}-lines.jsonl" if way.suffix else stem
    command = way.command.format(file=shlex.quote(name), out=shlex.quote(out), quoted=f"'{name}'", made=f"'{out}'")
    what = "the file has CR line ends" if kind == "CR line ends" else f"the file is {kind}"
    return Location(name).wrong(what, kind, "JSONL, JSON, CSV or Parquet in UTF-8", f"convert it: {command}")


def refuse_encoding(raw: bytes, error: UnicodeDecodeError, place: Location, offset: int) -> DataError:
    """The error of a line that is not UTF-8, with the command for its likely encoding.

    Args:
        raw: The bytes of the line.
        error: What decoding them raised.
        place: Its place.
        offset: The offset of its first byte in the file.
    """
    at = f"byte {error.start + 1} of the line, offset {offset + error.start} in the file"
    around = raw[max(0, error.start - 8) : error.start + 8]
    fix = f"convert the file to UTF-8: {_iconv(raw, place.path)}"
    if not raw.endswith(b"\n"):
        fix = "convert it to UTF-8; or the file is truncated here"
    return place.wrong(f"a line is not UTF-8 at {at}", around, "UTF-8 text", fix)


def _iconv(raw: bytes, name: str) -> str:
    encoding = "WINDOWS-1252"
    try:
        text = raw.decode("gb18030")
        encoding = "GB18030" if any("\u4e00" <= char <= "\u9fff" for char in text) else encoding
    except UnicodeDecodeError:
        pass
    out = f"{os.path.splitext(os.path.basename(name))[0]}-utf8.jsonl"
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(name)} > {shlex.quote(out)}"
