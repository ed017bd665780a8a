"""No file makes a reader raise anything but an InputError: mutations of valid files, through every reader.

Run: pytest tests/fuzz (a seeded few), or tox run -e fuzz (100,000 in all; GLM4FT_FUZZ sets their number)
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mutations import mutated
from safetensors.torch import save_file

from glm4ft.cli import train as train_command
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.encoded_rows import read_rows
from glm4ft.data.reader import from_messages, read_conversations
from glm4ft.diagnosis.run_folder import find_files
from glm4ft.errors import InputError
from glm4ft.floors.head import read_head
from glm4ft.folders import COMPLETE_MARKER, damage, seal
from glm4ft.model.base_model import load_format, load_tokenizer, require_loadable
from glm4ft.model.checkpoint import require_whole_file, weight_files
from glm4ft.model.merge import require_adapter
from glm4ft.model.tiny import write_tiny_base
from glm4ft.train.trajectory import append_row, read_trajectory, rewind

NUM_INPUTS = int(os.environ.get("GLM4FT_FUZZ", "0"))
SEEDED = 60  # of the fastest readers, in the default suite


@dataclass(frozen=True)
class Reader:
    """A reader, and the file that it reads.

    Args:
        file: The file, below a folder with all the files of a run, an adapter and a base.
        read: What reads it, given the folder.
        cost: The number of inputs to the fastest reader that cost as much as one to this.
    """

    file: str
    read: Callable[[Path], Any]
    cost: int = 1

    @property
    def id(self) -> str:
        return f"{self.file}-{getattr(self.read, '__name__', 'read')}"


def reads_trajectory(folder: Path) -> None:
    read_trajectory(folder / "run/trajectory.jsonl")


def rewinds(folder: Path) -> None:
    rewind(folder / "run/trajectory.jsonl", 1)


def reads_rows(folder: Path) -> None:
    read_rows(folder / "run/rows.jsonl")


def parses(folder: Path) -> None:
    train_command.parse([f"--config={folder / 'run/config.yaml'}"])


def resumes(folder: Path) -> None:
    train_command.parse(["--resume", str(folder / "run")])


def finds_run(folder: Path) -> None:
    find_files(folder / "run")


def finds_foreign_run(folder: Path) -> None:
    find_files(folder / "foreign")


def reads_adapter(folder: Path) -> None:
    require_adapter(folder / "run")


def reads_weights_of_adapter(folder: Path) -> None:
    require_whole_file(folder / "run/adapter_model.safetensors")


def finds_damage(folder: Path) -> None:
    assert isinstance(damage(folder / "run"), str)


def checks_base(folder: Path) -> None:
    require_loadable(str(folder / "base"), "auto")


def finds_shards(folder: Path) -> None:
    weight_files(folder / "base")


def loads_tokenizer(folder: Path) -> None:
    load_tokenizer(str(folder / "base"))


def renders_tools(folder: Path) -> None:
    tokenizer, name = load_format(str(folder / "base"))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ChatFormat(name, tokenizer).encode(from_messages(messages, tools))


def reads_head(folder: Path) -> None:
    read_head(str(folder / "base"))


def reads_conversations(folder: Path) -> None:
    for _ in read_conversations(folder / "data.jsonl"):
        pass


READERS = [
    Reader("run/trajectory.jsonl", reads_trajectory),
    Reader("run/trajectory.jsonl", rewinds),
    Reader("run/rows.jsonl", reads_rows),
    Reader("run/config.yaml", parses, 10),
    Reader("run/config.yaml", resumes, 10),
    Reader("run/config.yaml", finds_run, 10),
    Reader("run/trajectory.jsonl", finds_run, 10),
    Reader("foreign/trainer_state.json", finds_foreign_run),
    Reader("run/adapter_config.json", reads_adapter),
    Reader("run/adapter_model.safetensors", reads_weights_of_adapter),
    Reader(f"run/{COMPLETE_MARKER}", finds_damage),
    Reader("base/config.json", checks_base, 5),
    Reader("base/model.safetensors.index.json", finds_shards),
    Reader("base/tokenizer.json", loads_tokenizer, 50),
    Reader("base/tokenizer_config.json", loads_tokenizer, 50),
    Reader("base/chat_template.jinja", renders_tools, 50),
    Reader("base/config.json", reads_head, 5),
    Reader("data.jsonl", reads_conversations),
]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with a valid file of every kind."""
    folder = tmp_path_factory.mktemp("valid")
    write_tiny_base(folder / "base", max_shard_size="500KB")
    run, foreign = folder / "run", folder / "foreign"
    run.mkdir()
    foreign.mkdir()
    append_row(run / "trajectory.jsonl", {"type": "header", "rows": 2, "rows_sha256": "a", "config": {"seed": 0}})
    for step in (1, 2):
        numbers = {"loss": 1.5, "grad_norm": 0.5, "lr": 1e-3, "tokens": 9, "supervised_tokens": 3}
        append_row(run / "trajectory.jsonl", {"type": "step", "step": step, **numbers})
        append_row(run / "trajectory.jsonl", {"type": "eval", "step": step, "eval_loss": 2.0})
    row = {"index": 0, "line": 1, "input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    (run / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"line": 2, "dropped": "too long"}) + "\n")
    options = {
        "data": "demo",
        "output": "out",
        "learning_rate": 1e-3,
        "lora": {"rank": 4, "options": {"use_rslora": True}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    log = [{"step": 1, "loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-4}, {"step": 1, "eval_loss": 1.0}]
    state = {"log_history": log, "train_batch_size": 2, "global_step": 1, "max_steps": 2}
    (foreign / "trainer_state.json").write_text(json.dumps(state))
    adapter = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "tiny", "target_modules": ["q_proj"]}
    (run / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"a": torch.zeros(2, 2), "b": torch.ones(3)}, run / "adapter_model.safetensors")
    seal(run, [run / "adapter_config.json", run / "adapter_model.safetensors"])
    calls = {"messages": [
        {"role": "system", "content": "s", "tools": [{"type": "function", "function": {"name": "f", "required": []}}]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]}  # fmt: skip
    shares = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"}
    (folder / "data.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in (calls, shares, {"prompt": "a", "completion": "b"}))
    )
    return folder


def reads(reader: Reader, folder: Path) -> bool:
    """Whether a reader accepts its file; what it raises otherwise is an InputError."""
    try:
        reader.read(folder)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.id)
def test_reader_raises_nothing_but_input_errors(reader: Reader, valid: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(valid, tmp_path / "files")
    content = (folder / reader.file).read_bytes()
    reader.read(folder)
    share = NUM_INPUTS * (1 / reader.cost) / sum(1 / other.cost for other in READERS)
    num_examples = max(1, round(share or SEEDED / reader.cost))
    num_refused = 0

    @settings(max_examples=num_examples, derandomize=not NUM_INPUTS, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.integers(0, 2**64 - 1))
    @example(0)
    @example(335)  # YAML and JSON that nest too deeply for the decoder
    @example(4943)  # a number that is null in the header of a trajectory
    @example(5107)
    def read(seed: int) -> None:
        nonlocal num_refused
        (folder / reader.file).write_bytes(mutated(content, seed))
        num_refused += not reads(reader, folder)

    read()
    assert num_refused > 0 or reader.read is finds_damage or num_examples < 20


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.id)
def test_pipe_or_folder_in_place_of_a_file_is_an_input_error(reader: Reader, valid: Path, tmp_path: Path) -> None:
    """A pipe that nobody writes to, a folder, a link to itself: nothing hangs, nothing else is raised."""
    folder = shutil.copytree(valid, tmp_path / "files")
    path = folder / reader.file
    replacements: list[Callable[[Path], Any]] = [
        Path.mkdir, functools.partial(os.symlink, path), Path.touch, lambda path: path.symlink_to("/dev/null"),
    ]  # fmt: skip
    if reader.read is not reads_conversations:
        replacements.append(os.mkfifo)
    for replacement in replacements:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        replacement(path)
        reads(reader, folder)
