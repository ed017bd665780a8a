"""A file that is encoded on several cores gives the rows, the report and the errors that it gives on one.

Run: pytest tests/data/test_portions.py
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import glm4ft.data.portions
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.dataset import prepare_rows
from glm4ft.data.portions import Portions
from glm4ft.data.read_options import ReadOptions
from glm4ft.errors import DataError
from glm4ft.model.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, which is safe on Linux alone")
TINY_FORMAT = ChatFormat("glm-4-0414", tiny_tokenizer())
CORES = 3


@pytest.fixture
def portions_of_two(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the number of cores; a portion has two records, and no file is too small for several cores."""
    monkeypatch.setattr(glm4ft.data.portions, "RECORDS", 2)
    monkeypatch.setattr(glm4ft.data.portions, "MIN_BYTES", 0)
    return lambda cores: monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))


def talk(number: int, **keys: Any) -> str:
    turns = [
        {"role": "user", "content": f"q{number} " * (number % 7 + 1)},
        {"role": "assistant", "content": f"a{number}"},
    ]
    return json.dumps({"messages": turns * (number % 3 + 1), **keys})


LINES = [
    *(talk(number, **{f"key{number % 4}": 1}) for number in range(15)),
    "{", "", '{"messages": []}', talk(3), '{"messages": [{"role": "assistant", "content": 3}]}', talk(4), talk(5),
]  # fmt: skip


def entry(folder: Path) -> dict[str, bytes]:
    (found,) = folder.glob("rows/*")
    return {
        path.name: path.read_bytes() for path in found.iterdir() if path.suffix in (".npy", ".int32", ".bool", ".json")
    }


@pytest.mark.parametrize("num_good", [1, 2, 15])
def test_rows_and_report_are_those_of_one_core(
    portions_of_two: Callable[[int], None], tmp_path: Path, num_good: int
) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join([*LINES[:num_good], *LINES[15:]]))
    found = []
    for cores in (1, CORES):
        portions_of_two(cores)
        cache = tmp_path / str(cores)
        prepare_rows(path, TINY_FORMAT, max_length=60, options=ReadOptions(on_error="skip"), cache=cache)
        found.append(entry(cache))
    assert len(found[0]["lines.npy"]) > 128  # more than a header
    assert json.loads(found[0]["report.json"])["unusable"]
    assert found[0] == found[1]


@pytest.mark.parametrize("cores", [1, CORES])
def test_errors_are_told_in_the_order_of_the_file(
    portions_of_two: Callable[[int], None], tmp_path: Path, cores: int
) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(LINES))
    portions_of_two(cores)
    with pytest.raises(DataError) as caught:
        prepare_rows(path, TINY_FORMAT, max_length=60, cache=tmp_path / "cache")
    assert caught.value.message == "3 of 21 conversations cannot be used"
    assert [error.where.split(":")[1] for error in caught.value.errors] == ["16", "18", "20"]
    assert list((tmp_path / "cache").glob("rows/*")) == []


@pytest.mark.parametrize("cores", [1, CORES])
def test_the_end_of_a_damaged_file_is_an_error_with_its_parts(
    portions_of_two: Callable[[int], None], tmp_path: Path, cores: int
) -> None:
    path = tmp_path / "talks.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(LINES[:15] * 40).encode())[:-30])
    portions_of_two(cores)
    with pytest.raises(DataError) as caught:
        prepare_rows(path, TINY_FORMAT, max_length=60, cache=tmp_path / "cache")
    assert caught.value.where == str(path)
    assert caught.value.message.startswith("a file cannot be read")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("cores", [1, CORES])
def test_an_empty_file_is_an_error(portions_of_two: Callable[[int], None], tmp_path: Path, cores: int) -> None:
    (tmp_path / "talks.jsonl").write_text("\n\n")
    portions_of_two(cores)
    with pytest.raises(DataError, match="holds no conversation"):
        prepare_rows(tmp_path / "talks.jsonl", TINY_FORMAT, max_length=60, cache=tmp_path / "cache")


def test_encoding_draws_no_random_numbers(portions_of_two: Callable[[int], None], tmp_path: Path) -> None:
    (tmp_path / "talks.jsonl").write_text("\n".join(LINES[:15]))
    portions_of_two(CORES)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    prepare_rows(tmp_path / "talks.jsonl", TINY_FORMAT, max_length=60, cache=tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), before)


def test_several_cores_take_part(
    portions_of_two: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the process that writes the rows encodes none of them."""
    (tmp_path / "talks.jsonl").write_text("\n".join(LINES[:15]))
    portions_of_two(CORES)
    encode = Portions._encode

    def with_process(*args: Any, **kwargs: Any) -> Any:
        portion = encode(*args, **kwargs)
        (tmp_path / f"process-{os.getpid()}").touch()
        return portion

    monkeypatch.setattr(Portions, "_encode", with_process)
    prepare_rows(tmp_path / "talks.jsonl", TINY_FORMAT, max_length=60, cache=tmp_path / "cache")
    names = {path.name for path in tmp_path.glob("process-*")}
    assert len(names) == CORES
    assert f"process-{os.getpid()}" not in names
