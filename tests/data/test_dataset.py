"""Rows survive the way to disk and back, truncation cuts whole turns, and nothing is dropped without being counted.

Run: pytest tests/data/test_dataset.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm4ft.data import dataset
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.dataset import ENCODER_MODULES, code_digest, prepare_rows
from glm4ft.data.encoded_row import IGNORED
from glm4ft.data.encoding import NO_TARGETS, TOO_LONG, fit_row
from glm4ft.data.inputs import DEMO_DATA
from glm4ft.data.reader import from_messages, read_conversations
from glm4ft.errors import DataError
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.testing.subjects.founding_bug import FoundingBugFormat


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    return ChatFormat("glm-4-0414", tiny_tokenizer())


def write(path: Path, *conversations: list[tuple[str, str]] | dict[str, Any]) -> Path:
    """JSONL of conversations given as (role, content) pairs or whole records."""
    records = [
        {"messages": [{"role": role, "content": content} for role, content in c]} if isinstance(c, list) else c
        for c in conversations
    ]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def talk(num_turns: int, system: str = "") -> list[tuple[str, str]]:
    turns = [(role, f"{role} {i}") for i in range(num_turns) for role in ("user", "assistant")]
    return [("system", system), *turns] if system else turns


def test_rows_on_disk_are_the_rows_encoded(chat_format: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", talk(1), talk(3, system="Be brief."))
    rows, report = prepare_rows(path, chat_format, max_length=200, cache=tmp_path)
    expected = [
        chat_format.encode(from_messages([{"role": r, "content": c} for r, c in talk(1)])),
        chat_format.encode(from_messages([{"role": r, "content": c} for r, c in talk(3, system="Be brief.")])),
    ]
    assert [rows[i]["input_ids"].tolist() for i in range(2)] == [row.input_ids for row in expected]
    assert [rows[i]["labels"].tolist() for i in range(2)] == [row.labels for row in expected]
    assert [rows[i]["lines"] for i in range(2)] == [[1], [2]]
    assert (report.conversations, report.rows) == (2, 2)
    assert report.tokens == sum(rows.lengths) == sum(len(row.input_ids) for row in expected)
    assert report.supervised_tokens == sum(sum(row.supervised) for row in expected)


@pytest.mark.parametrize("format_name", ["glm-4-0414", "glm-4-9b-chat"])
def test_truncation_drops_the_oldest_exchanges(format_name: str) -> None:
    """Prefix, system and the last turns stay, at every length the row is what its shorter conversation encodes to."""
    chat_format = ChatFormat(format_name, tiny_tokenizer())
    messages = [{"role": role, "content": content} for role, content in talk(5, system="Be brief.")]
    whole = len(chat_format.encode(from_messages(messages)).input_ids)
    seen = set()
    for max_length in range(whole, 0, -1):
        row, reason = fit_row(from_messages(messages), chat_format, max_length)
        if row is None:
            assert reason == TOO_LONG
            continue
        assert len(row.input_ids) <= max_length
        kept = [messages[0], *messages[len(messages) - 2 * len(row.turns) :]]
        assert row.input_ids == chat_format.encode(from_messages(kept)).input_ids
        longer = [messages[0], *messages[len(messages) - 2 * len(row.turns) - 2 :]]
        fits_longer = len(chat_format.encode(from_messages(longer)).input_ids) <= max_length
        assert len(row.turns) == 5 or not fits_longer
        seen.add(len(row.turns))
    assert seen == {1, 2, 3, 4, 5}


def test_truncation_never_parts_a_call_from_its_question() -> None:
    """The unit is the exchange: question, call, observation and reply go together."""
    chat_format = ChatFormat("glm-4-0414", tiny_tokenizer())
    exchange = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "metadata": "get", "content": "{}"},
        {"role": "observation", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    ]
    tools = [{"type": "function", "function": {"name": "get"}}]
    one = len(chat_format.encode(from_messages(exchange, tools)).input_ids)
    two = len(chat_format.encode(from_messages(exchange * 2, tools)).input_ids)
    for max_length in range(one, two):
        row, _ = fit_row(from_messages(exchange * 2, tools), chat_format, max_length)
        assert row is not None
        assert row.input_ids == chat_format.encode(from_messages(exchange, tools)).input_ids


def test_trailing_question_does_not_push_out_the_last_answer() -> None:
    """Trailing messages are context without a target; the last exchange is the last one with an answer."""
    chat_format = ChatFormat("glm-4-0414", tiny_tokenizer())
    messages = [{"role": role, "content": content} for role, content in [*talk(2), ("user", "and?")]]
    last = len(chat_format.encode(from_messages(messages[2:])).input_ids)
    row, _ = fit_row(from_messages(messages), chat_format, last)
    assert row is not None
    assert len(row.turns) == 1
    assert any(row.supervised)


def test_dropped_and_truncated_rows_are_counted_with_their_lines(chat_format: ChatFormat, tmp_path: Path) -> None:
    untrained = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]}
    long = [("user", "x" * 500), ("assistant", "y")]
    path = write(tmp_path / "a.jsonl", talk(1), untrained, long, [*long, *talk(1)], untrained)
    rows, report = prepare_rows(path, chat_format, max_length=100, cache=tmp_path)
    assert report.dropped == {NO_TARGETS: [2, 5], TOO_LONG: [3]}
    assert report.truncated == [4]
    assert [rows[i]["lines"] for i in range(len(rows))] == [[1], [4]]
    assert "dropped, no supervised token: 2 (lines 2, 5)" in report.describe()
    assert "oldest turns cut to fit max_length: 1 (line 4)" in report.describe()


def test_no_row_left_is_an_error(chat_format: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("user", "x" * 500), ("assistant", "y")])
    with pytest.raises(DataError, match=r"(?s)no conversation is left.*longer than max_length.*line 1"):
        prepare_rows(path, chat_format, max_length=100, cache=tmp_path / "cache")


def test_bad_conversation_leaves_nothing_in_the_cache(chat_format: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", talk(1))
    path.write_text(path.read_text() + "{bad\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        prepare_rows(path, chat_format, max_length=100, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_cache_is_used_again(chat_format: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_rows(DEMO_DATA, chat_format, max_length=600, cache=tmp_path)
    monkeypatch.setattr("glm4ft.data.dataset._Encoder.write", lambda *_: pytest.fail("encoded again"))
    rows, _ = prepare_rows(DEMO_DATA, chat_format, max_length=600, cache=tmp_path)
    assert len(rows) == 2


@pytest.mark.parametrize("change", ["data", "max_length", "format", "encoder", "template", "tokenizer", "option"])
def test_cache_is_not_used_after_a_change(change: str, tmp_path: Path) -> None:
    """A stale cache trains on another model's ids without a sign (axolotl 1265, 1298)."""
    path = write(tmp_path / "a.jsonl", talk(2))

    def prepare(changed: str = "") -> None:
        tokenizer = tiny_tokenizer()
        if changed == "tokenizer":
            tokenizer.add_tokens(["zzz"])
        if changed == "template":
            tokenizer.chat_template += " "
        name = "glm-4-9b-chat" if changed == "format" else "glm-4-0414"
        encoder = FoundingBugFormat if changed == "encoder" else ChatFormat
        chat_format = encoder(name, tokenizer, train_on="last" if changed == "option" else "all")
        prepare_rows(path, chat_format, max_length=99 if changed == "max_length" else 100, cache=tmp_path)

    def entries() -> set[str]:
        return {folder.name for folder in (tmp_path / "rows").iterdir()}

    prepare()
    before = entries()
    if change == "data":
        write(path, talk(3))
    prepare(change)
    assert len(entries()) == len(before) + 1


def test_key_depends_on_the_encoder_and_on_nothing_else(tmp_path: Path) -> None:
    """Editing another module keeps the rows; editing one that encodes them drops them."""
    package = Path(shutil.copytree(Path(dataset.__file__).parent, tmp_path / "data"))
    before = code_digest(package)
    for module in sorted(path.stem for path in package.glob("*.py")):
        path = package / f"{module}.py"
        text = path.read_text("utf-8")
        path.write_text(text + "# edited\n", "utf-8")
        code_digest.cache_clear()
        assert (code_digest(package) != before) == (module in ENCODER_MODULES), module
        path.write_text(text, "utf-8")
    assert set(ENCODER_MODULES) <= {path.stem for path in package.glob("*.py")}


def test_every_module_that_encoding_loads_is_known_to_matter_or_not() -> None:
    """A module that is imported from now on has to be named as an encoder, or here with the reason why it is none."""
    no_encoders = {
        "glm4ft", "glm4ft.data",  # empty
        "glm4ft.errors",  # words a refusal, which leaves no row
        "glm4ft.data.batching",  # arranges rows that are encoded already
        "glm4ft.data.cache", "glm4ft.files", "glm4ft.folders",  # keep what was encoded, under digests
        "glm4ft.reading",  # reads the seals of folders, and no conversations
    }  # fmt: skip
    code = (
        "import sys, glm4ft.data.dataset, glm4ft.data.portions, glm4ft.data.formats, glm4ft.data.reader as reader\n"
        "import glm4ft.data.template_format\n"  # which formats loads when it is asked for
        "reader.from_messages([{'role': 'assistant', 'content': 'a'}]).warnings\n"
        "print(*(n for n in sys.modules if 'glm4ft' in n))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) == no_encoders | {f"glm4ft.data.{name}" for name in ENCODER_MODULES}


def test_row_is_read_back_with_its_turns(chat_format: ChatFormat, tmp_path: Path) -> None:
    """Round trip and report use the row as it was encoded for training, instead of encoding it again."""
    path = write(tmp_path / "a.jsonl", talk(3), talk(1))
    rows, _ = prepare_rows(path, chat_format, max_length=1000, cache=tmp_path / "cache")
    for index, conversation in enumerate(read_conversations(path)):
        encoded = chat_format.encode(conversation)
        assert rows.encoded(index) == replace(encoded, segments=())
        assert rows.encoded(index).expected == encoded.supervised


def test_labels_ignore_what_is_not_supervised(chat_format: ChatFormat, tmp_path: Path) -> None:
    rows, _ = prepare_rows(DEMO_DATA, chat_format, max_length=600, cache=tmp_path)
    for i in range(len(rows)):
        labels, ids = rows[i]["labels"], rows[i]["input_ids"]
        assert ((labels == IGNORED) | (labels == ids)).all()
