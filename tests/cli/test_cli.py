"""Every command does what its help says, and bad input is one readable block, exit status 2, and nothing written.

Run: pytest tests/cli/test_cli.py
"""

from __future__ import annotations

import errno
import io
import json
import re
import resource
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from glm4ft.cli.main import run
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.inputs import DEMO_DATA
from glm4ft.data.reader import read_conversations
from glm4ft.model.generation import greedy
from glm4ft.model.tiny import write_tiny_base
from glm4ft.train.trajectory import read_trajectory

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def talk(*messages: tuple[str, Any], **record: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **record}


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


@dataclass(frozen=True)
class BadData:
    """A file that cannot be used, and what the error must say."""

    id: str
    content: bytes
    says: tuple[str, ...]


CALL = {"role": "assistant", "content": "{}", "metadata": "f"}
BAD_DATA = [
    BadData("malformed JSON", lines(GOOD) + b'{"messages": [}\n', ("data.jsonl:2", "not JSON at column 15")),
    BadData(
        "wrong role", lines(GOOD, talk(("robot", "x"))), ("data.jsonl:2: messages[0].role", "'robot'", "assistant")
    ),
    BadData("empty content", lines(talk(("user", "a"), ("assistant", ""))), ("data.jsonl:1: messages[1].content",)),
    BadData(
        "missing content",
        lines({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}),
        ("data.jsonl:1: messages[0].content", "missing"),
    ),
    BadData("no assistant turn", lines(GOOD, talk(("user", "a"))), ("data.jsonl:2: messages[0]", "no assistant turn")),
    BadData(
        "consecutive assistant turns",
        lines(GOOD, talk(("user", "a"), ("assistant", "b"), ("assistant", "c"))),
        ("data.jsonl:2: messages[2].role", "--allow_nonstop_terminator"),
    ),
    BadData(
        "call without tools",
        lines({"messages": [{"role": "user", "content": "a"}, CALL]}),
        ("data.jsonl:1: messages[1]", "without tools"),
    ),
    BadData("invalid UTF-8", lines(GOOD) + b'{"messages": "\xff"}\n', ("data.jsonl:2", "not UTF-8 at byte 15")),
    BadData("truncated file", lines(GOOD) + lines(GOOD)[:40], ("data.jsonl:2", "truncated")),
    BadData("empty file", b"", ("data.jsonl", "no conversation")),
    BadData("lone surrogate", lines(GOOD).replace(b"Hello", b"\\ud800"), ("data.jsonl:1: messages[1].content",)),
]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(argv: list[str], capsys: pytest.CaptureFixture[str], folder: Path, *says: str) -> None:
    """Status 2, one block with each of the texts, no traceback, and nothing changed below the folder."""
    before = snapshot(folder)
    status = run(argv)
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.startswith("glm4ft: error: ")
    assert "Traceback" not in error
    for text in says:
        assert text in error
    assert snapshot(folder) == before
    assert not (folder / "out").exists()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM4FT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("case", BAD_DATA, ids=lambda case: case.id)
@pytest.mark.parametrize("command", ["train", "inspect"])
def test_bad_data_is_refused(case: BadData, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(case.content)
    argv = {
        "train": ["train", f"--data={data}", f"--output={tmp_path / 'out'}"],
        "inspect": ["inspect", str(data), f"--json={tmp_path / 'out'}"],
    }[command]
    assert_refused(argv, capsys, tmp_path, *case.says)


def test_consecutive_assistant_turns_train_with_the_option(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(lines(talk(("user", "a"), ("assistant", "b"), ("assistant", "c"))))
    argv = ["train", f"--data={data}", f"--output={tmp_path / 'out'}", "--max_steps=1"]
    assert run([*argv, "--allow_nonstop_terminator=true"]) == 0


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--data={tmp}", ("cannot read this directory",)),
        ("--data={tmp}/none.jsonl", ("No such file",)),
        ("--model={tmp}/none", ("none",)),
        ("--model=./none", ("none",)),
        ("--dtype=int8", ("--dtype", "int8", "auto, bf16 or fp32")),
        ("--chat_format=glm-z1", ("unknown chat format",)),
        ("--chat_format=chatml", ("chatml", "glm-4-0414")),
        ("--learning-rat=1", ("--learning_rat", "--learning_rate")),
        ("--lora.rnk=1", ("--lora.rnk", "--lora.rank")),
        ("--lora.targets=[gate_proj]", ("gate_proj", "gate_up_proj")),
        ("--lora.options.use_rs_lora=true", ("use_rs_lora", "use_rslora")),
        ("--schedule=cos", ("--schedule", "cos", "'cosine', 'linear', 'constant'")),
        ("--max_steps=0", ("--max_steps", "more than 0")),
        ("--packing", ("--packing", "true or false")),
        ("--report_to=[nonesuch]", ("--report_to", "nonesuch")),
        ("--report_to=tensorboard", ("--report_to", "a list, as [a,b]")),
        ("--lora.options.modules_to_save=[nope]", ("modules_to_save", "nope")),
        ("--lora.options.init_lora_weights=pissa", ("init_lora_weights", "pissa", "changes the base")),
        ("--max_length=3", ("no conversation is left", "--max_length")),
        ("--config={tmp}/none.yaml", ("none.yaml", "No such file")),
        ("--resume={tmp}/none", ("no run to resume",)),
    ],
)
def test_bad_option_is_refused(
    option: str, says: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--data=demo", f"--output={tmp_path / 'out'}", option.format(tmp=tmp_path)]
    assert_refused(argv, capsys, tmp_path, *says)


@pytest.mark.parametrize("option", ["--limit=-1", "--max_length=0"])
def test_bad_option_of_inspect_is_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["inspect", "demo", option], capsys, tmp_path, option.partition("=")[0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("learning_rat: 1", ("config.yaml", "learning_rat", "learning_rate")),
        ("lora: {rnk: 3}", ("config.yaml", "lora.rnk", "lora.rank")),
        ("lora: 3", ("lora",)),
        ("[1, 2]", ("config.yaml", "not a configuration")),
        ("data: [", ("config.yaml",)),
        ("data: !!python/object/apply:os.getcwd []", ("config.yaml", "cannot read")),
    ],
)
def test_bad_configuration_is_refused(
    content: str, says: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert_refused(["train", f"--config={tmp_path / 'config.yaml'}"], capsys, tmp_path, *says)


@pytest.fixture(scope="module")
def sharded_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"), max_shard_size="500KB")


def test_missing_shard_is_refused_before_anything_is_encoded(
    tmp_path: Path, sharded_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(sharded_base, tmp_path / "base")
    shard = sorted(base.glob("model-*.safetensors"))[1]
    shard.unlink()
    monkeypatch.setattr("glm4ft.train.run.prepare_rows", lambda *_, **__: pytest.fail("encoded"))
    argv = ["train", "--data=demo", f"--model={base}", f"--output={tmp_path / 'out'}"]
    assert_refused(argv, capsys, tmp_path, shard.name)


def test_fp16_is_refused_before_anything_is_encoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm4ft.train.run.prepare_rows", lambda *_, **__: pytest.fail("encoded"))
    argv = ["train", "--data=demo", "--dtype=fp16", f"--output={tmp_path / 'out'}"]
    assert_refused(argv, capsys, tmp_path, "--dtype", "overflow")


def test_tokenizer_without_control_tokens_is_refused(
    tmp_path: Path, sharded_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(sharded_base, tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<|observation|>"]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    argv = ["inspect", "demo", f"--model={base}", f"--json={tmp_path / 'out'}"]
    assert_refused(argv, capsys, tmp_path, "<|observation|>", "control tokens")


def test_full_disk_is_one_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails while the run is set up leaves nothing behind."""

    def fail(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("glm4ft.train.run_folder.write_atomically", fail)
    argv = ["train", "--data=demo", f"--output={tmp_path / 'out'}"]
    assert_refused(argv, capsys, tmp_path, "No space left on device", "cannot be written")


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_full_disk_is_named_where_it_is(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the cache of encoded conversations, and that of ``inspect --json``."""
    full = {"train": tmp_path / "cache" / "rows", "inspect": tmp_path / "rows.jsonl"}[command]
    argv = {"train": ["train", "--data=demo", f"--output={tmp_path / 'out'}"], "inspect": ["inspect", "demo"]}[command]
    monkeypatch.setenv("GLM4FT_CACHE", str(tmp_path / "cache"))
    _, hard = unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        assert_refused([*argv, *[f"--json={full}"] * (command == "inspect")], capsys, tmp_path, str(full), "be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize(("limit_kib", "status"), [(300, 2), (700, 1)])
def test_disk_that_fills_up_is_one_block(
    tmp_path: Path, limit_kib: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With files limited to 300 KiB the base does not fit: nothing is left. With 700 a checkpoint does not."""
    base = write_tiny_base(tmp_path / "base") if status == 1 else "tiny"
    argv = ["train", "--data=demo", f"--model={base}", "--max_steps=2", "--save_every=1", "--lora.rank=64"]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_kib * 1024, unlimited[1]))  # Python ignores the signal: EFBIG
    try:
        assert run([*argv, f"--output={tmp_path / 'out'}"]) == status
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    error = capsys.readouterr().err
    assert error.startswith("glm4ft: error: ")
    assert "cannot be written" in error
    assert "Traceback" not in error
    assert (tmp_path / "out").exists() == (status == 1)


def test_run_that_misses_its_target_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--data=demo", f"--output={tmp_path / 'out'}", "--max_steps=2", "--target_loss=0.01"]
    assert run(argv) == 1
    assert "target 0.01 NOT reached" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("has_begun", [True, False])
def test_interrupted_run_says_how_to_go_on_once_there_is_a_run(
    has_begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    place = "SupervisedTrainer.train" if has_begun else "load_base"
    monkeypatch.setattr(f"glm4ft.train.run.{place}", interrupt)
    assert run(["train", "--data=demo", f"--output={tmp_path / 'a run'}"]) == 130
    error = capsys.readouterr().err
    assert ("--resume" in error) == (f"--resume '{tmp_path / 'a run'}'" in error) == has_begun
    assert "interrupted" in error


def test_folder_that_holds_no_run_is_not_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert run(["train", "--data=demo", f"--output={tmp_path}"]) == 2
    assert "--resume" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "merge"])
def test_fix_for_a_full_device_names_options_that_the_command_has(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(_: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"glm4ft.cli.{command}.run", fill)
    assert run([command, "adapter", "--output=merged"] if command == "merge" else [command]) == 1
    assert ("--micro_batch_size" in capsys.readouterr().err) == (command == "train")


def test_stream_of_another_encoding_shows_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="latin-1", write_through=True))
    assert run(["inspect", "demo"]) == 0
    assert rb"\u" in raw.getvalue()


def test_template_that_fails_on_tools_is_one_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_base(tmp_path / "base")
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text("{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + template.read_text())
    assert run(["inspect", "demo", f"--model={tmp_path / 'base'}"]) == 2
    error = capsys.readouterr().err
    assert "fails on the conversation's tools" in error
    assert "no tools here" in error
    assert f"{DEMO_DATA}:2" in error


def test_template_without_end_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hundred million million rounds are stopped, not left running; the checkpoint is named."""
    monkeypatch.setattr("glm4ft.data.format_check.TEMPLATE_LIMIT_S", 0.2)
    base = write_tiny_base(tmp_path / "base")
    loop = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}"
        + "{% endfor %}" * 2
    )
    (base / "chat_template.jinja").write_text(loop)
    assert run(["inspect", "demo", f"--model={base}"]) == 2
    assert re.search(rf"contradicts the chat format(?s:.*){base}(?s:.*)stopped after 0\.2 s", capsys.readouterr().err)
    deadline_s = time.monotonic() + 20
    while any("(run)" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not any("(run)" in thread.name for thread in threading.enumerate())


def test_flags_win_over_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": "demo", "max_steps": 9, "lora": {"rank": 4}}))
    argv = ["train", f"--config={tmp_path / 'config.yaml'}", "--max-steps=2", f"--output={tmp_path / 'out'}"]
    assert run(argv) == 0
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (config["max_steps"], config["lora"]["rank"], config["lora"]["alpha"]) == (2, 4, 16.0)
    assert len(read_trajectory(tmp_path / "out" / "trajectory.jsonl").steps) == 2


def test_inspect_writes_the_ids_that_training_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By contract: a JSON line per conversation on stdout, and nothing else there."""
    assert run(["inspect", "demo", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    base = write_tiny_base(tmp_path / "base")
    chat_format = ChatFormat("glm-4-0414", AutoTokenizer.from_pretrained(base))
    for index, conversation in enumerate(read_conversations(DEMO_DATA)):
        row = chat_format.encode(conversation)
        wanted = {"schema": 1, "index": index, "line": index + 1, "input_ids": row.input_ids, "labels": row.labels}
        assert records[index] == wanted
    assert len(records) == 2


def test_inspect_says_what_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    untrained = {"messages": [GOOD["messages"][0], {**GOOD["messages"][1], "loss": False}]}
    data.write_bytes(lines(GOOD, untrained))
    assert run(["inspect", str(data), "--json=-"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[1])
    assert record == {"schema": 1, "index": 1, "line": 2, "dropped": "no supervised token"}


SPOILT = [GOOD, {**GOOD, "source": "x"}, {"prompt": "a", "completion": ""}, {"prompt": "b", "chosen": "c"}]


def test_inspect_skips_what_cannot_be_used_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(lines(*SPOILT))
    assert run(["inspect", str(data)]) == 2
    assert "2 of 4 conversations cannot be used" in capsys.readouterr().err
    assert run(["inspect", str(data), "--on_error=skip", f"--json={tmp_path / 'rows'}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not used, keys: source (1)" in shown
    assert "line 3: dropped, cannot be used: a text is empty" in shown
    records = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [record["line"] for record in records] == [1, 2, 3, 4]
    assert ["dropped" in record for record in records] == [False, False, True, True]


def test_train_says_at_the_end_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(lines(*SPOILT))
    argv = ["train", f"--data={data}=2", f"--output={tmp_path / 'out'}", "--max_steps=1"]
    assert run(argv) == 2
    assert not (tmp_path / "out").exists()
    assert run([*argv, "--on_error=skip"]) == 0
    said = capsys.readouterr().out
    assert "SKIPPED, a text is empty: 1 (line 3)" in said
    assert "trained WITHOUT 2 of 4 conversations, which cannot be used" in said[said.index("loss ") :]
    assert "a record holds preference data" in (tmp_path / "out" / "report.html").read_text()
    header = read_trajectory(tmp_path / "out" / "trajectory.jsonl").header
    assert header["rows"] == 4, "two conversations, each of them twice"


def test_readme_command_learns_the_demo_and_its_merge_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user types it: ``glm4ft train`` in an empty folder, then ``glm4ft merge``, then plain transformers."""
    monkeypatch.chdir(tmp_path)
    assert run(["train"]) == 0
    said = capsys.readouterr().out
    assert "target 0.01 reached" in said
    assert "round trip: 4 of 4 turns came back exactly" in said
    (output,) = (tmp_path / "runs").iterdir()
    assert len(read_trajectory(output / "trajectory.jsonl").steps) <= 60
    assert run(["merge", str(output), f"--output={tmp_path / 'merged'}"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|user|>", "<|observation|>"]
    )
    chat_format = ChatFormat("glm-4-0414", tokenizer)
    for conversation in read_conversations(DEMO_DATA):
        row = chat_format.encode(conversation)
        for turn in row.turns:
            expected = row.input_ids[turn.start : turn.end + 1]
            assert greedy(model, row.input_ids[: turn.start], chat_format.stop_ids, len(expected) + 16) == expected


@pytest.mark.parametrize("payload", ["\x1b[2J\x1b]0;title\x07", "a\n::error::fail", "\u202egpj", "##vso[task.x]"])
def test_errors_show_names_and_values_as_harmless_text(payload: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", payload]) == 2
    shown = capsys.readouterr().err
    assert not re.search(r"[\x1b\x07\u202e]|^\s*::|##\w*\[", shown, re.MULTILINE)
    assert "glm4ft: error: " in shown
