"""The cache gives back the rows of the file's bytes or none: damage is noticed, leftovers go, its size is bounded.

Run: pytest tests/data/test_cache.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm4ft.cli.main import run as command
from glm4ft.data.cache import entries
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.dataset import prepare_rows
from glm4ft.errors import ConfigError, DataError
from glm4ft.folders import COMPLETE_MARKER, only_writer
from glm4ft.model.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tiny_format() -> ChatFormat:
    return ChatFormat("glm-4-0414", tiny_tokenizer())


def talks(path: Path, num: int = 4) -> Path:
    turns = [("user", "assistant")] * num
    records = [
        {"messages": [{"role": role, "content": f"{role} {i}"} for role in roles]} for i, roles in enumerate(turns)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [Path.unlink, cut, flip, lambda path: path.write_bytes(b""), replace_by_folder])
def test_damaged_entry_is_noticed_and_encoded_again(
    harm: Callable[[Path], None], tmp_path: Path, tiny_format: ChatFormat
) -> None:
    """Seven files, each damaged in five ways."""
    path, cache = talks(tmp_path / "data.jsonl"), tmp_path / "cache"
    rows, report = prepare_rows(path, tiny_format, max_length=100, cache=cache)
    digest = rows.sha256()
    (entry,) = entries(cache)
    names = sorted(file.name for file in entry.folder.iterdir())
    assert len(names) == 8
    for name in names:
        harm(entry.folder / name)
        rows, again = prepare_rows(path, tiny_format, max_length=100, cache=cache)
        assert rows.sha256() == digest, name
        assert again.rows == report.rows
        assert ("were damaged" in again.describe()) or name == COMPLETE_MARKER, name
        assert prepare_rows(path, tiny_format, max_length=100, cache=cache)[1].damage == ""


@pytest.mark.parametrize("restored", [False, True])
def test_file_that_changes_while_it_is_encoded_is_not_remembered(
    restored: bool, tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = talks(tmp_path / "data.jsonl", num=4000), tmp_path / "cache"
    content, encode = path.read_bytes(), ChatFormat.encode

    def encode_and_cut(self: ChatFormat, conversation: Any) -> Any:
        if conversation.line == 2:
            os.truncate(path, content.index(b"\n", 300_000) + 1 if len(content) > 300_000 else 1000)
            if restored:
                path.write_bytes(content)
        return encode(self, conversation)

    with monkeypatch.context() as patch:
        patch.setattr(ChatFormat, "encode", encode_and_cut)
        with pytest.raises(DataError, match=r"changed while|truncated"):
            prepare_rows(path, tiny_format, max_length=100, cache=cache)
    path.write_bytes(content)
    assert len(prepare_rows(path, tiny_format, max_length=100, cache=cache)[0]) == 4000


def test_leftovers_of_a_killed_encoder_are_removed(tmp_path: Path, tiny_format: ChatFormat) -> None:
    code = (
        "import os, sys; from pathlib import Path; from glm4ft.data.cache import find_or_write\n"
        "def write(folder): (folder / 'half').write_text('half'); os._exit(9)\n"
        "find_or_write(Path(sys.argv[1]), 'other', write)"
    )
    cache = tmp_path / "cache"
    assert subprocess.run([sys.executable, "-c", code, str(cache)], check=False).returncode == 9
    assert (cache / "rows" / "other" / ".unfinished" / "half").exists()
    held = cache / "rows" / "held"
    with only_writer(held, COMPLETE_MARKER):  # an encoder that is at work
        (held / ".unfinished").mkdir()
        prepare_rows(talks(tmp_path / "data.jsonl"), tiny_format, max_length=100, cache=cache)
        assert held.exists()
    assert "other" not in {entry.folder.name for entry in entries(cache)}


def test_entries_unused_for_longest_go_beyond_the_bound(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("GLM4FT_CACHE_GIB", str(50_000 / 2**30))
    files = [talks(tmp_path / f"{num}.jsonl", num=num) for num in (100, 101, 102, 103)]
    for at, path in enumerate(files):
        rows, _ = prepare_rows(path, tiny_format, max_length=100, cache=cache)
        if at == 0:
            (first,) = entries(cache)
        for age, entry in enumerate(entries(cache)):
            os.utime(entry.folder / COMPLETE_MARKER, (age, age))
        prepare_rows(files[0], tiny_format, max_length=100, cache=cache)  # stays, since it is used
    kept = entries(cache)
    assert first.folder in {entry.folder for entry in kept}
    assert len(kept) == 2
    assert sum(entry.num_bytes for entry in kept) <= 50_000
    assert len(rows) == 103
    monkeypatch.setenv("GLM4FT_CACHE_GIB", "much")
    with pytest.raises(ConfigError, match="GLM4FT_CACHE_GIB"):
        prepare_rows(talks(tmp_path / "one.jsonl", num=1), tiny_format, max_length=100, cache=cache)


def test_command_shows_and_empties_the_cache(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLM4FT_CACHE", str(tmp_path / "cache"))
    prepare_rows(talks(tmp_path / "data.jsonl"), tiny_format, max_length=100)
    (entry,) = entries(tmp_path / "cache")
    assert command(["cache"]) == 0
    assert entry.folder.name in (shown := capsys.readouterr().out)
    assert "1 encoded files, 0.0 MiB of at most 20,480.0 MiB" in shown
    cut(entry.folder / "lines.npy")
    assert command(["cache"]) == 0
    assert "lines.npy has" in capsys.readouterr().out
    assert command(["cache", "--clear"]) == 0
    assert command(["cache"]) == 0
    assert ": 0 encoded files" in capsys.readouterr().out


def test_pipe_is_refused_as_a_file_to_encode(tmp_path: Path, tiny_format: ChatFormat) -> None:
    """It would have to be read twice, and one that nobody writes to would never end."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="read only once"):
        prepare_rows(tmp_path / "pipe", tiny_format, max_length=100, cache=tmp_path / "cache")
