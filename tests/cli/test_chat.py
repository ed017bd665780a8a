"""One can talk to what was trained: it streams, it stops at every stop token, and it shows its calls.

Run: pytest tests/cli/test_chat.py
"""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import glm4ft
from glm4ft.cli.main import run
from glm4ft.data.control_tokens import STOPS
from glm4ft.model.chat import Chat, load_chat
from glm4ft.model.merge import merge_adapter
from glm4ft.model.tiny import tiny_tokenizer
from glm4ft.text.safe_text import visible
from glm4ft.text.token_stream import TokenStream
from glm4ft.train.run_folder import complete

DEMO = [
    json.loads(line)
    for line in (Path(glm4ft.__file__).parent / "demo" / "two_conversations.jsonl").read_text("utf-8").splitlines()
]
TALK, CALL = (record["messages"] for record in DEMO)
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def tools_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools") / "tools.json"
    path.write_text(json.dumps(DEMO[1]["tools"]), "utf-8")
    return path


def asking_for_the_weather(source: Path, tools_file: Path) -> list[str]:
    return [
        "chat",
        str(source),
        "--system",
        CALL[0]["content"],
        "--tools",
        str(tools_file),
        "--once",
        CALL[1]["content"],
    ]


def test_once_prints_the_answer_that_was_trained_and_nothing_else(
    learnt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["chat", str(learnt.output), "--once", TALK[0]["content"]]) == 0
    assert capsys.readouterr().out == TALK[1]["content"] + "\n"


def test_call_is_shown_with_its_tool(learnt: Any, tools_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(asking_for_the_weather(learnt.output, tools_file)) == 0
    out, err = capsys.readouterr()
    assert out == f"{CALL[2]['metadata']}\n{CALL[2]['content']}\n"
    assert "a call of get_weather" in err


def test_json_holds_the_exact_answer(learnt: Any, tools_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*asking_for_the_weather(learnt.output, tools_file), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["schema"], answer["tool"], answer["content"]) == (1, CALL[2]["metadata"], CALL[2]["content"])
    assert answer["stop"] == "<|observation|>"


def test_answer_that_does_not_stop_is_cut_off_and_fails(learnt: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", str(learnt.output), "--once", TALK[0]["content"], "--max_new_tokens", "3"]) == 1
    assert "cut off after 3 tokens: no stop token came" in capsys.readouterr().err


def test_conversation_goes_on_with_the_result_of_the_call(
    learnt: Any, tools_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter([CALL[1]["content"], CALL[3]["content"], "", "/new", CALL[1]["content"]])
    prompts = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", answer)
    arguments = asking_for_the_weather(learnt.output, tools_file)
    assert run(arguments[: arguments.index("--once")]) == 0
    out, err = capsys.readouterr()
    assert f"\n{CALL[4]['content']}\n" in out
    assert prompts == ["you> ", "result of get_weather> ", "you> ", "you> ", "you> ", "result of get_weather> "]
    assert out.count(CALL[2]["content"]) == 2  # /new began again
    assert "tools: get_weather" in err


def test_merged_folder_and_moved_run_say_the_same(
    learnt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge_adapter(learnt.output, tmp_path / "merged")
    moved = Path(shutil.copytree(learnt.output, tmp_path / "moved"))
    config = moved / "adapter_config.json"
    config.write_text(config.read_text("utf-8").replace(str(learnt.output), "/gone"), "utf-8")
    complete(moved)
    for source in (tmp_path / "merged", moved):
        assert run(["chat", str(source), "--once", TALK[0]["content"]]) == 0
        assert capsys.readouterr().out == TALK[1]["content"] + "\n"


@pytest.mark.parametrize("stop", STOPS)
def test_every_stop_token_ends_an_answer(stop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat_format, _ = load_chat("tiny")
    stop_id = chat_format.control_ids[stop]
    newline = chat_format.tokenizer.encode("\n", add_special_tokens=False)[0]
    forced = iter([newline, 10, 11, stop_id, 12, 12, 12])

    def force(*_: Any, **__: Any) -> Any:
        logits = head(*_, **__)
        logits[..., next(forced)] = 1e4
        return logits

    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", force)
    seen: list[int] = []
    answer = Chat(model, chat_format).say("hi", max_new_tokens=7, on_token=seen.append)
    assert (answer.stop, answer.num_tokens) == (stop, 4)
    assert seen == [newline, 10, 11]


def test_temperature_samples(learnt: Any) -> None:
    model, chat_format, _ = load_chat(str(learnt.output))
    answers = {Chat(model, chat_format).say("a", temperature=9.0, max_new_tokens=8).content for _ in range(3)}
    assert len(answers) > 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--json"], "--once"),
        (["--tools", "none.json"], "none.json"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["chat", "tiny", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_run_that_was_not_finished_names_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "adapter_config.json").write_text("{}")
    assert run(["chat", str(tmp_path), "--once", "x"]) == 2
    assert "checkpoint-5" in capsys.readouterr().err


# --- the stream ---


def streamed(text: str) -> Iterator[str]:
    stream = TokenStream(TOKENIZER)
    for token_id in TOKENIZER.encode(text, add_special_tokens=False):
        yield stream.push(token_id)
    yield stream.flush()


def safe(text: str) -> str:
    return "\n".join(
        visible(line, newlines=False, reserved=list(TOKENIZER.get_added_vocab())).replace("⇥", "\t")
        for line in text.split("\n")
    )


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="⇥↵\r"), max_size=30).filter(
        lambda t: "<|" not in t and "[" not in t
    )
)
def test_pieces_of_a_stream_are_characters_of_the_text(text: str) -> None:
    """What is shown begins no command and ends in the middle of no character, wherever tokens end."""
    shown = "".join(streamed(text))
    assert not any("\ud800" <= char <= "\udfff" for char in shown)
    assert not any(line.lstrip().startswith("::") for line in shown.split("\n"))
    is_plain = text.isascii() and text.replace("\n", "").isprintable()
    if is_plain and not {":", "\\", "<"} & set(text):  # text like a control token's, <sop>, is marked as text
        assert shown == text


@pytest.mark.parametrize(
    "text", ["::error::x", "\n  ::error::", "a##[group]b", "a\x1b[2J", "你好\u202eabc", "\t:x\n:: y"]
)
def test_text_that_commands_a_terminal_or_a_runner_is_shown_harmless(text: str) -> None:
    assert "".join(streamed(text)) == safe(text)


def test_stream_shows_text_as_soon_as_its_token_is_there() -> None:
    assert [piece for piece in streamed("The city") if piece] == ["The", " city"]
