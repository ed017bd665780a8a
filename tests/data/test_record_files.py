"""Files of every kind are read record by record, or refused at their place with the command that converts them.

Run: pytest tests/data/test_record_files.py
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation
from glm4ft.data.dataset import prepare_rows
from glm4ft.data.inputs import data_inputs
from glm4ft.data.read_options import ReadOptions
from glm4ft.data.reader import parse_conversation, read_conversations
from glm4ft.data.refusals import ManyErrors, Refusals
from glm4ft.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def answered(**keys: Any) -> dict[str, Any]:
    return {"messages": [USER, ASSISTANT], **keys}


GOOD = json.dumps(answered()).encode()


def read(folder: Path, data: bytes) -> list[Conversation]:
    path = folder / "chat.jsonl"
    path.write_bytes(data)
    return list(read_conversations(path))


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (GOOD, [1]),
        (b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD + b"\n", [1, 4]),
        (b"\n" + GOOD + b"\n\n", [2]),
    ],
)
def test_lines_are_numbered_as_in_the_file(tmp_path: Path, data: bytes, lines: list[int]) -> None:
    found = read(tmp_path, data)
    assert [conversation.line for conversation in found] == lines
    assert {conversation.path for conversation in found} == {str(tmp_path / "chat.jsonl")}
    assert all(replace(each, line=0, path="") == parse_conversation(answered()) for each in found)


BAD_FILES: dict[str, tuple[bytes, str, str]] = {  # id: file, line of the fault, words of the message
    "malformed": (GOOD + b'\n{"messages": [}\n', ":2", "column 15"),
    "truncated": (GOOD + b"\n" + GOOD[:-9], ":2", "the file looks truncated"),
    "truncated-character": (GOOD + b'\n{"messages": "\xe5\x8c', ":2", "the file is truncated"),
    "not-utf8": (GOOD + b'\n{"messages": "\xff"}\n', ":2", f"byte 15 of the line, offset {len(GOOD) + 15} in the file"),
    "not-utf8-after-bom": (b'\xef\xbb\xbf"\xff"', ":1", "byte 2 of the line, offset 4 in the file"),
    "bom-later": (GOOD + b"\n\xef\xbb\xbf" + GOOD, ":2", "second byte order mark (BOM)"),
    "duplicate-key": (b'{"prompt": "a", "prompt": "b"}\n', ":1", "'prompt' stands twice"),
    "nan": (b'{"prompt": NaN}\n', ":1", "NaN is not a JSON number"),
    "infinity": (b'{"prompt": -Infinity}\n', ":1", "-Infinity is not a JSON number"),
    "long-integer": (b'{"tools": ' + b"1" * 5000 + b"}\n", ":1", ""),  # which fault depends on Python's digit limit
    "empty": (b"", "chat.jsonl", "no conversation"),
    "blank": (b"\n \r\n", "chat.jsonl", "no conversation"),
    "deep": (b"[" * 100_000 + b"\n", ":1", "nested too deeply"),
    "bad-record": (GOOD + b'\n\n{"messages": [{"role": "user"}]}', ":3: messages[0].content", "missing"),
    "list-later": (GOOD + b"\n[]\n", ":2", "not an object"),
}


@pytest.mark.parametrize(("data", "where", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_at_its_line(tmp_path: Path, data: bytes, where: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, data)
    assert f"{tmp_path / 'chat.jsonl'}{where if where.startswith(':') else ''}" in caught.value.where
    assert words in str(caught.value)


@pytest.mark.parametrize(("name", "words"), [(".", "datasets"), ("no.jsonl", "No such file"), ("\0", "cannot be read")])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        next(read_conversations(os.path.join(tmp_path, name)))
    assert str(tmp_path) in caught.value.where


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes, which this system lacks")
def test_a_conversation_arrives_before_the_next_line_is_written(tmp_path: Path) -> None:
    pipe, arrived = tmp_path / "pipe", threading.Event()
    os.mkfifo(pipe)
    seen_in_time: list[bool] = []

    def write() -> None:
        with open(pipe, "wb", buffering=0) as file:
            file.write(GOOD + b"\n")
            seen_in_time.append(arrived.wait(timeout=5))
            file.write(b"not JSON\n")

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    reader = read_conversations(pipe)
    assert next(reader).line == 1
    arrived.set()
    with pytest.raises(DataError, match="column 1"):
        next(reader)
    writer.join(timeout=5)
    assert seen_in_time == [True]


def test_memory_holds_lines_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    line = json.dumps({"prompt": "a", "completion": "b" * 20_000}) + "\n"
    path.write_text(line * 300)
    tracemalloc.start()
    count = sum(1 for _ in read_conversations(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 300
    assert peak < 20 * len(line), f"{peak} bytes for lines of {len(line)}"


# --- other formats --------------------------------------------------------------------------------------------------

RECORDS = [{"prompt": f"question {n}", "completion": f"answer {n}\n[1], 中"} for n in range(40)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
PRETTY = json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()
CSV = "prompt,completion,note\n" + "".join(
    f'"{record["prompt"]}","{record["completion"]}",\n' for record in RECORDS
)  # fmt: skip
FORMATS: dict[str, tuple[str, bytes]] = {
    "jsonl": ("x.jsonl", LINES),
    "array": ("x.json", PRETTY),
    "array-on-one-line": ("x.json", json.dumps(RECORDS).encode()),
    "array-of-lines": ("x.json", b"[\n" + LINES.replace(b"}\n", b"},\n")[:-2] + b"\n]\n"),
    "array-with-bom": ("x.json", codecs.BOM_UTF8 + PRETTY),
    "pretty-objects": ("x.json", b"\n".join(json.dumps(record, indent=2).encode() for record in RECORDS)),
    "lists-of-messages": ("x.jsonl", "".join(json.dumps([
        {"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]) + "\n"
        for r in RECORDS).encode()),
    "gzip": ("x.jsonl.gz", gzip.compress(LINES)),
    "gzip-without-suffix": ("x", gzip.compress(LINES)),
    "gzip-array": ("x.json.gz", gzip.compress(PRETTY)),
    "bzip2": ("x.jsonl.bz2", bz2.compress(LINES)),
    "xz": ("x.jsonl.xz", lzma.compress(LINES)),
    "csv": ("x.csv", CSV.encode()),
    "csv-semicolon-bom-crlf": ("x.csv", codecs.BOM_UTF8 + CSV.replace(",", ";", 2).replace('","', '";"')
                               .replace('",\n', '";\r\n').encode()),
    "tsv-gz": ("x.tsv.gz", gzip.compress(CSV.replace(",", "\t", 2).replace('","', '"\t"').replace('",\n', '"\t\n')
                                         .encode())),
}  # fmt: skip


@pytest.mark.parametrize(("name", "data"), FORMATS.values(), ids=FORMATS)
def test_each_format_holds_the_same_conversations(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    found = list(read_conversations(tmp_path / name))
    assert [[m.content for m in c.messages] for c in found] == [[r["prompt"], r["completion"]] for r in RECORDS]
    assert [conversation.line for conversation in found] == list(range(1, 41))


@pytest.mark.parametrize("size", [2**18 - 40, 2**18, 2**19, 2**20 + 7])
def test_a_record_may_be_longer_than_what_is_read_at_a_time(tmp_path: Path, size: int) -> None:
    records = [{"prompt": "a" * size, "completion": "中"}, {"prompt": "b", "completion": "c" * size}] * 2
    (tmp_path / "x.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8")
    found = [[m.content for m in c.messages] for c in read_conversations(tmp_path / "x.json")]
    assert found == [list(record.values()) for record in records]


def test_cells_of_csv_are_text_to_the_letter(tmp_path: Path) -> None:
    """A reader of tables makes numbers and missing values of 42, NA and None."""
    messages = json.dumps([USER, ASSISTANT]).replace('"', '""')
    (tmp_path / "x.csv").write_text(f'prompt,completion,messages\n42,NA,\n" a",None,\n,,"{messages}"\n')
    found = [[m.content for m in c.messages] for c in read_conversations(tmp_path / "x.csv")]
    assert found == [["42", "NA"], [" a", "None"], ["a", "b"]]


def broken(change: Callable[[bytes], bytes], name: str = "x.json") -> tuple[str, bytes]:
    return name, change(PRETTY if name == "x.json" else CSV.encode())


BROKEN = {
    "array-cut": (*broken(lambda data: data[:-30]), "truncated"),
    "array-cut-between": (*broken(lambda data: data[: data.rindex(b",\n  {")]), "truncated"),
    "array-malformed": (*broken(lambda data: data.replace(b"question 7", b'question" 7')), "x.json:31"),
    "array-no-comma": (*broken(lambda data: data.replace(b"},", b"}", 1)), "after record 1 this JSON array"),
    "array-duplicate-key": ("x.json", b'[{"prompt": "a", "prompt": "b"}]', "stands twice"),
    "array-nan": ("x.json", b'[{"prompt": NaN}]', "NaN is not a JSON number"),
    "array-deep": ("x.json", b"[" * 100_000, "nested too deeply"),
    "array-not-utf8": ("x.json", PRETTY.replace("中".encode(), b"\xff", 1), "not UTF-8"),
    "array-empty": ("x.json", b"[]", "no conversation"),
    "array-of-numbers": ("x.json", b"[1, 2]", "not an object"),
    "csv-cells": (*broken(lambda data: data + b"a,b,c,d\n", "x.csv"), "another number of cells"),
    "csv-columns": ("x.csv", b"prompt,prompt\na,b\n", "two columns have one name"),
    "csv-not-utf8": ("x.csv", b"prompt,completion\na,\xff\n", "not UTF-8"),
    "gzip-cut": ("x.gz", gzip.compress(LINES)[:-20], "cannot be read"),
}


@pytest.mark.parametrize(("name", "data", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_conversations(tmp_path / name))
    assert words in str(caught.value)
    assert name in caught.value.where


CONVERTED = {
    "utf-16": ("x.jsonl", LINES.decode().encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "utf-16-without-mark": ("x.jsonl", LINES.decode().encode("utf-16-le"), "iconv -f UTF-16LE"),
    "utf-32": ("x.jsonl", LINES.decode().encode("utf-32"), "iconv -f UTF-32"),
    "gb18030": ("x.jsonl", '{"prompt": "北京", "completion": "中国"}\n'.encode("gb18030"), "iconv -f GB18030"),
    "latin-1": ("x.jsonl", '{"prompt": "caf\xe9", "completion": "b"}\n'.encode("latin-1"), "iconv -f WINDOWS-1252"),
    "cr": ("x.jsonl", LINES.replace(b"\n", b"\r"), r"tr '\r' '\n' <"),
    "second-bom": ("x.jsonl", LINES + codecs.BOM_UTF8 + LINES, r"sed -i 's/^\xef\xbb\xbf//'"),
    "zstd": ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "zstd -dc"),
    "zip": ("x.jsonl", b"PK\x03\x04\x14", "unzip"),
    "lfs": ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": ("x.jsonl", b"\n<!DOCTYPE html>\n<html>", "download the file itself"),
    "pickle": ("x.pkl", b"\x80\x04\x95\x10", "a pickle can run any code"),
    "sqlite": ("x.db", b"SQLite format 3\x00", "sqlite3 -json"),
    "python": ("x.jsonl", b"{'prompt': 'a'}\n", "write JSON with double quotes"),
}


@pytest.mark.parametrize(("name", "data", "command"), CONVERTED.values(), ids=CONVERTED)
def test_what_is_not_read_is_answered_with_the_command(tmp_path: Path, name: str, data: bytes, command: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_conversations(tmp_path / name))
    assert command in caught.value.fix
    assert name in caught.value.where


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.csv"])
def test_memory_holds_records_not_the_file(tmp_path: Path, name: str) -> None:
    record, path = {"prompt": "a", "completion": "b" * 20_000}, tmp_path / name
    array = json.dumps([record] * 400, indent=1).encode()
    csv = b"prompt,completion\n" + (f"a,{record['completion']}\n" * 400).encode()
    path.write_bytes(csv if name == "x.csv" else gzip.compress(array) if name.endswith("gz") else array)
    tracemalloc.start()
    count = sum(1 for _ in read_conversations(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 400
    assert peak < len(array) / 4, f"{peak} bytes for a file of {len(array)}"


# --- all errors at once ---------------------------------------------------------------------------------------------


def spoilt(folder: Path, num_bad: int) -> Path:
    """A file in which every other record has an empty answer, and one line is no JSON."""
    bad, path = json.dumps({"prompt": "a", "completion": ""}), folder / "x.jsonl"
    path.write_text("".join(f"{json.dumps(answered())}\n{bad}\n" for _ in range(num_bad - 1)) + "{\n")
    return path


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ManyErrors) as caught:
        list(read_conversations(spoilt(tmp_path, 4)))
    text = str(caught.value)
    assert text.startswith("4 of 7 conversations cannot be used:")
    assert [f"x.jsonl:{line}: completion: found ''" in text for line in (2, 4, 6)] == [True] * 3
    assert "x.jsonl:7: found" in text
    assert "--on_error skip" in caught.value.fix


def test_the_first_ten_are_told_and_all_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ManyErrors) as caught:
        list(read_conversations(spoilt(tmp_path, 30)))
    assert str(caught.value).startswith("30 of 59 conversations cannot be used; the first 10:")
    assert str(caught.value).count("x.jsonl:") == 10


def test_a_single_error_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(read_conversations(spoilt(tmp_path, 1)))
    assert not isinstance(caught.value, ManyErrors)
    assert caught.value.fix.endswith("; or leave such conversations out with --on_error skip")


def test_skipping_keeps_the_rest_and_counts(tmp_path: Path) -> None:
    refusals = Refusals("skip")
    found = list(read_conversations(spoilt(tmp_path, 4), ReadOptions(on_error="skip"), refusals))
    assert [conversation.line for conversation in found] == [1, 3, 5]
    assert (refusals.count, refusals.read) == (4, 7)
    assert [line for _, line in refusals.new()] == [2, 4, 6, 7]


def test_what_cannot_be_read_further_ends_the_reading_also_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(PRETTY[:-30])
    with pytest.raises(DataError, match="truncated"):
        list(read_conversations(tmp_path / "x.json", ReadOptions(on_error="skip")))


# --- data sets ------------------------------------------------------------------------------------------------------


def test_tables_and_folders_are_read_with_datasets(tmp_path: Path) -> None:
    """A table fills in nulls at every depth: they are no keys, or a call would get the arguments of other calls."""
    datasets = pytest.importorskip("datasets", reason="needs datasets, which the extra data installs")
    tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
    calls = [
        {"function": {"name": "f", "arguments": {"city": "Bonn"}}},
        {"function": {"name": "g", "arguments": {"n": 1}}},
    ]
    rows = [{"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": tools} for call in calls]
    table = datasets.Dataset.from_list([*rows, answered()])
    (tmp_path / "folder" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "x.parquet")
    table.to_parquet(tmp_path / "folder" / "data" / "train-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": table, "held": table.select([2])}).save_to_disk(tmp_path / "both")
    arrow = next((tmp_path / "disk").glob("*.arrow"))
    for name in (tmp_path / "x.parquet", arrow, tmp_path / "folder", tmp_path / "disk", tmp_path / "both"):
        found = list(read_conversations(name))
        assert [c.messages[1].content for c in found] == ['{"city": "Bonn"}', '{"n": 1}', "b"], name
        assert found[0].where() == f"{name}: record 1"
    assert len(list(read_conversations(f"{tmp_path / 'both'}:held"))) == 1
    with pytest.raises(DataError, match="datasets cannot read"):
        list(read_conversations(f"{tmp_path / 'both'}:none"))


def test_without_datasets_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for name in (str(tmp_path / "x.parquet"), str(tmp_path), "org/name:train"):
        with pytest.raises(DataError, match=r"pip install 'glm4ft\[data\]'"):
            list(read_conversations(name))


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("org/talks", ("org/talks", None, "train")),
        ("org/talks:test", ("org/talks", None, "test")),
        ("org/talks:train[5%:10%]", ("org/talks", None, "train[5%:10%]")),
        ("org/talks:polite:train[:2]", ("org/talks", "polite", "train[:2]")),
    ],
)
def test_a_data_set_of_the_hub_is_asked_for_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat_format: ChatFormat, name: str, asked: tuple[str, ...]
) -> None:
    """With a stand-in for the hub: what the library is asked for, and what becomes of the rows that it gives."""
    datasets = pytest.importorskip("datasets", reason="needs datasets, which the extra data installs")
    talks, calls = datasets.Dataset.from_list([answered(system="Be brief."), answered()]), list[tuple[Any, ...]]()

    def load(path: str, config: str | None = None, *, split: str) -> Any:
        calls.append((path, config, split))
        return talks

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    found = list(read_conversations(name))
    assert [len(conversation.messages) for conversation in found] == [3, 2]
    assert found[1].where() == f"{name}: record 2"
    rows, report = prepare_rows(f"{name}=2", chat_format=chat_format, max_length=4096)
    assert (len(rows), report.conversations) == (4, 2)
    assert set(calls) == {asked}
    again, _ = prepare_rows(f"{name}=2", chat_format=chat_format, max_length=4096)
    assert again.sha256() == rows.sha256()


@pytest.mark.parametrize("name", ["org/nothing", "org/nothing:test"])
def test_a_data_set_that_the_hub_does_not_give_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which the extra data installs")

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'org/nothing' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="datasets cannot read this data set") as caught:
        list(read_conversations(name))
    assert caught.value.where == name
    assert "Couldn't reach" in caught.value.found
    assert "org/name:split" in caught.value.fix


@pytest.mark.parametrize("name", ["hf://datasets/org/talks", "https://example.org/datasets/org/talks"])
def test_the_address_of_a_data_set_is_answered_with_its_id(name: str) -> None:
    with pytest.raises(DataError) as caught:
        data_inputs(name)
    assert "a data set of the hub is named org/name" in caught.value.fix
