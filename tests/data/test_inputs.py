"""Several files, patterns and weights: each conversation is trained as often as its file's weight says.

Run: pytest tests/data/test_inputs.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.dataset import prepare_rows
from glm4ft.data.encoding import encoded_conversations
from glm4ft.data.inputs import DEMO_DATA, DataInput, data_inputs
from glm4ft.data.portions import Portions
from glm4ft.data.read_options import AS_IS, ReadOptions
from glm4ft.errors import ConfigError, DataError
from glm4ft.model.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    return ChatFormat("glm-4-0414", tiny_tokenizer())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files of 1, 2 and 5 conversations; the second begins with a blank line."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 1), ("b", 2), ("c", 5)):
        records = [{"prompt": f"{name}{n}", "completion": f"{name} {n}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n" * (name == "b") + "".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def test_names_weights_patterns_and_lists(folder: Path) -> None:
    names = {
        "a.jsonl": [("a.jsonl", 1)],
        "a.jsonl,b.jsonl=2": [("a.jsonl", 1), ("b.jsonl", 2)],
        "a.jsonl, a.jsonl": [("a.jsonl", 1), ("a.jsonl", 1)],
        "[ab].jsonl=.5": [("a.jsonl", 0.5), ("b.jsonl", 0.5)],
        "*.jsonl": [("a.jsonl", 1), ("b.jsonl", 1), ("c.jsonl", 1)],
        "demo=3": [(str(DEMO_DATA), 3)],
        "org/name:split=2": [("org/name:split", 2)],
        "org/name:config:split": [("org/name:config:split", 1)],
    }
    for name, expected in names.items():
        assert [(one.name, one.weight) for one in data_inputs(name)] == expected
    assert data_inputs(["a.jsonl", "b.jsonl=2"]) == data_inputs("a.jsonl,b.jsonl=2")
    (folder / "odd,name=2.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    assert data_inputs("odd,name=2.jsonl") == [DataInput("odd,name=2.jsonl")], "a file that is there is meant"


@pytest.mark.parametrize("name", ["none.jsonl", "a.jsonl,none.jsonl", "x*.jsonl", "some/none.jsonl", "a.jsonl/x"])
def test_a_file_that_is_not_there_is_refused_at_once(folder: Path, name: str) -> None:
    with pytest.raises(DataError):
        data_inputs(name)


@pytest.mark.parametrize("name", ["a.jsonl=0", "a.jsonl=5000", "", []])
def test_no_input_and_a_weight_out_of_range_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        data_inputs(name)


@given(weight=st.floats(0.01, 20), num_rows=st.integers(0, 200))
def test_repeats_come_to_the_weight_evenly(weight: float, num_rows: int) -> None:
    repeats = [DataInput("x", weight).repeats(index) for index in range(num_rows)]
    assert abs(sum(repeats) - weight * num_rows) < 1 + 1e-9
    assert all(abs(count - weight) < 1 for count in repeats)


def test_rows_are_trained_as_often_as_their_weight_says(folder: Path, chat_format: ChatFormat) -> None:
    rows, report = prepare_rows("a.jsonl=3,b.jsonl,c.jsonl=0.4", chat_format, max_length=100, cache=folder / "cache")
    lines = Counter(rows[index]["lines"][0] for index in range(len(rows)))
    # b begins behind line 1 of a and has a blank line; c behind line 3 of b
    assert lines == {1: 3, 1 + 2: 1, 1 + 3: 1, 4 + 3: 1, 4 + 5: 1}
    assert (report.conversations, report.rows) == (8, 7)
    assert report.tokens == sum(rows.lengths) == sum(len(rows[i]["input_ids"]) for i in range(len(rows)))
    assert report.supervised_tokens == sum(rows.target_counts().values())
    assert "c.jsonl: 5 conversations, 2 rows" in report.describe()
    assert "weight 0.4" in report.describe()
    assert "its line 1 is called line 5 where" in report.describe()
    shown = Counter(
        outcome.row.line
        for outcome in encoded_conversations(data_inputs("a.jsonl=3,b.jsonl,c.jsonl=0.4"), chat_format, 100, AS_IS)
        for _ in range(outcome.repeats)
        if outcome.row is not None
    )
    assert shown == lines, "inspect, floor and explain see the rows and lines that train sees"


def test_each_row_is_that_of_its_own_file(folder: Path, chat_format: ChatFormat) -> None:
    joined, _ = prepare_rows("b.jsonl,a.jsonl", chat_format, max_length=100, cache=folder / "cache")
    alone = [
        prepare_rows(name, chat_format, max_length=100, cache=folder / "cache")[0] for name in ("b.jsonl", "a.jsonl")
    ]
    expected = [part.encoded(index) for part in alone for index in range(len(part))]
    found = [joined.encoded(index) for index in range(len(joined))]
    assert [row.input_ids for row in found] == [row.input_ids for row in expected]
    assert [row.turns for row in found] == [row.turns for row in expected]
    assert [row.line for row in found] == [2, 3, 4]


def test_the_digest_knows_order_and_weight(folder: Path, chat_format: ChatFormat) -> None:
    """By it a resumed run recognises its rows."""
    names = ("a.jsonl", "a.jsonl,b.jsonl", "b.jsonl,a.jsonl", "a.jsonl=2,b.jsonl", "a.jsonl,b.jsonl=2")
    rows = [prepare_rows(name, chat_format, max_length=100, cache=folder / "cache")[0] for name in names]
    assert len({each.sha256() for each in rows}) == len(names)


def test_a_file_more_encodes_that_file_alone(
    folder: Path, chat_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_rows("a.jsonl,b.jsonl", chat_format, max_length=100, cache=folder / "cache")
    encoded = []
    monkeypatch.setattr(
        "glm4ft.data.portions.Portions", lambda one, *rest: encoded.append(one.name) or Portions(one, *rest)
    )
    prepare_rows("a.jsonl,b.jsonl=2,c.jsonl", chat_format, max_length=100, cache=folder / "cache")
    assert encoded == ["c.jsonl"]


def test_errors_of_all_files_are_told_at_once(folder: Path, chat_format: ChatFormat) -> None:
    for name in "ac":
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write('{"prompt": "a", "completion": ""}\n{\n')
    with pytest.raises(DataError) as caught:
        prepare_rows("a.jsonl,b.jsonl,c.jsonl", chat_format, max_length=100, cache=folder / "cache")
    text = str(caught.value)
    assert text.startswith("4 of 12 conversations cannot be used:")
    assert all(place in text for place in ("a.jsonl:2: completion", "a.jsonl:3", "c.jsonl:6: completion", "c.jsonl:7"))
    assert list((folder / "cache").glob("rows/*")) == []


def test_what_is_skipped_is_in_the_report_also_when_the_rows_are_found_again(
    folder: Path, chat_format: ChatFormat
) -> None:
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "assistant")]
    with (folder / "c.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": ""}\n{\n' + json.dumps({"messages": messages}) + "\n")
    for _ in range(2):
        options = ReadOptions(on_error="skip")
        rows, report = prepare_rows("c.jsonl", chat_format, max_length=100, options=options, cache=folder / "cache")
        assert (len(rows), report.rows, report.conversations, report.num_unusable) == (5, 5, 5, 3)
        assert "SKIPPED, a text is empty: 1 (line 6)" in report.describe()
        assert "header is no stop token: 1 (line 8)" in report.describe()
        assert report.skipped_sentence().startswith("trained WITHOUT 3 of 8 conversations")
    with pytest.raises(DataError, match="3 of 8 conversations cannot be used"):
        prepare_rows("c.jsonl", chat_format, max_length=100, cache=folder / "cache")


@pytest.mark.parametrize(
    "options", [{"columns": {"prompt": "completion", "completion": "prompt"}}, {"calls_in_content": True}]
)
def test_rows_that_were_read_otherwise_are_not_found(
    folder: Path, chat_format: ChatFormat, options: dict[str, object]
) -> None:
    for each in (AS_IS, ReadOptions(**options)):  # type: ignore[arg-type]
        prepare_rows("a.jsonl", chat_format, max_length=100, options=each, cache=folder / "cache")
    assert len(list((folder / "cache" / "rows").iterdir())) == 2


def test_keys_without_a_meaning_are_counted(folder: Path, chat_format: ChatFormat) -> None:
    records = [{"prompt": "a", "completion": "b", "source": "x", "id": n} for n in range(3)]
    (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    _, report = prepare_rows("d.jsonl", chat_format, max_length=100, cache=folder / "cache")
    assert report.unused == {"source": 3, "id": 3}
    assert "not used, keys: source (3), id (3)" in report.describe()
