r"""Text from checkpoints, configurations, names, data and logs never reaches a terminal or a CI log raw.

Run: pytest tests/cli/test_harmless_output.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from glm4ft.cli.main import run
from glm4ft.model.tiny import write_tiny_base

PAYLOADS = [
    # what moves, clears, recolours, retitles or questions a terminal
    "\x1b[2J", "\x1b[31mred", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\link", "\x1b[6n", "\x1bc", "\x1b[?1049h",
    "\x1bP1$q\x1b\\", "\x9b2J", "\x90x\x9c", "\x9d0;t\x07", "\x07", "\x08\x08\x08", "\x7f", "\x0b\x0c", "\x0e\x0f",
    "\x05", "\x85next", "ok\rerror: forged", "a\r\n::error::b",
    # what commands a CI runner
    "::error::fail", "\n::error::fail", "\n  ::set-output name=a::b", "\n\t::add-mask::a", "\u00a0::error::x",
    "a\n::stop-commands::t", "##[group]", "##vso[task.setvariable variable=a]b", "##teamcity[x]", "\n##[error]x",
    "x ##[command]ls",
    # what hides characters, or shows them in another order
    "\u202egpj.exe", "\u2066a\u2069", "\u200f", "\u061c", "\u200b", "\u2060", "\ufeff", "\u2028::error::x", "\u2029x",
    "\U000e0041\U000e0042", "\u00ad", "a\u0334\u0334", "\u115f", "\ud800",
]  # fmt: skip


def assert_harmless(shown: str) -> None:
    for number, line in enumerate(shown.split("\n")):
        hidden = [hex(ord(c)) for c in line if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
        assert not hidden, f"line {number}: {line!r}"
        assert not re.match(r"\s*::", line), line
        assert not re.search(r"##\w*\[", line), line


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    return path


def talk(role: str = "user", **record: object) -> dict[str, object]:
    messages = [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]
    return {"messages": messages, **record}


def file_name(payload: str) -> str:
    return os.fsdecode(payload.encode("utf-8", "surrogatepass")).replace("/", "_")


# Each writes the payload into a file or a name, and returns a command that has to speak of it.
def in_architecture(payload: str, folder: Path) -> list[str]:
    write_json(folder / "base" / "config.json", {"architectures": [payload]})
    return ["inspect", "demo", f"--model={folder / 'base'}"]


def in_model_type(payload: str, folder: Path) -> list[str]:
    config = {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "vocab_size": payload}
    write_json(folder / "base" / "config.json", config)
    return ["train", "--data=demo", f"--model={folder / 'base'}", f"--output={folder / 'out'}"]


def in_yaml_key(payload: str, folder: Path) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump({payload: 1}, allow_unicode=False))
    return ["train", f"--config={folder / 'config.yaml'}"]


def in_yaml_value(payload: str, folder: Path) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump({"schedule": payload}, allow_unicode=False))
    return ["train", f"--config={folder / 'config.yaml'}"]


def in_broken_yaml(payload: str, folder: Path) -> list[str]:
    (folder / "config.yaml").write_bytes(f"a: [{payload}".encode("utf-8", "surrogatepass"))
    return ["train", f"--config={folder / 'config.yaml'}"]


def in_printed_config(payload: str, folder: Path) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": payload, "output": "b"}, allow_unicode=False))
    return ["train", f"--config={folder / 'config.yaml'}", "--print_config"]


def in_data_name(payload: str, folder: Path) -> list[str]:
    (folder / file_name(payload)).write_text("{bad\n")
    return ["inspect", str(folder / file_name(payload))]


def in_run_name(payload: str, folder: Path) -> list[str]:
    (folder / file_name(payload)).mkdir()
    return ["explain", str(folder / file_name(payload))]


def in_output_name(payload: str, folder: Path) -> list[str]:
    (folder / file_name(payload)).mkdir()
    (folder / file_name(payload) / "mine").touch()
    return ["train", "--data=demo", f"--output={folder / file_name(payload)}"]


def in_role(payload: str, folder: Path) -> list[str]:
    return ["inspect", str(write_json(folder / "data.jsonl", talk(role=payload)))]


def in_content(payload: str, folder: Path) -> list[str]:
    talks = [{"messages": [{"role": "user", "content": payload}, {"role": "assistant", "content": payload}]}]
    return ["inspect", str(write_json(folder / "data.jsonl", talks[0])), "--boundaries"]


def in_tool_name(payload: str, folder: Path) -> list[str]:
    record = talk(tools=[{"name": payload}, {"name": "f"}])
    record["messages"] = [{"role": "user", "content": "a"}, {"role": "assistant", "metadata": payload, "content": "{}"}]
    return ["inspect", str(write_json(folder / "data.jsonl", record))]


def in_unknown_key(payload: str, folder: Path) -> list[str]:
    return ["inspect", str(write_json(folder / "data.jsonl", {payload: 1}))]


def in_broken_line(payload: str, folder: Path) -> list[str]:
    (folder / "data.jsonl").write_bytes(b'{"messages": ' + payload.encode("utf-8", "surrogatepass") + b"\n")
    return ["inspect", str(folder / "data.jsonl")]


def in_adapter_type(payload: str, folder: Path) -> list[str]:
    write_json(folder / "adapter" / "adapter_config.json", {"peft_type": payload})
    return ["merge", str(folder / "adapter"), f"--output={folder / 'out'}"]


def in_adapters_base(payload: str, folder: Path) -> list[str]:
    config = {"peft_type": "LORA", "base_model_name_or_path": payload}
    write_json(folder / "adapter" / "adapter_config.json", config)
    save_file({"a": torch.zeros(1)}, folder / "adapter" / "adapter_model.safetensors")
    return ["merge", str(folder / "adapter"), f"--output={folder / 'out'}"]


def in_trajectory(payload: str, folder: Path) -> list[str]:
    rows = [{"type": "header"}, {"type": "step", "step": 1, "loss": payload}]
    (folder / "trajectory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["explain", str(folder)]


def in_broken_trajectory(payload: str, folder: Path) -> list[str]:
    row = f"{{{payload}".replace("\n", "").encode("utf-8", "replace")
    (folder / "trajectory.jsonl").write_bytes(b'{"type": "header"}\n' + row + b"\n")
    return ["explain", str(folder)]


def in_rows(payload: str, folder: Path) -> list[str]:
    write_json(folder / "trainer_state.json", {"log_history": [{"step": 1, "loss": 1.0}]})
    write_json(folder / "rows.jsonl", {"line": payload})
    return ["explain", str(folder), "--model=tiny", f"--rows={folder / 'rows.jsonl'}"]


def in_seal(payload: str, folder: Path) -> list[str]:
    write_json(folder / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
    write_json(folder / "adapter" / "complete", {"files": {payload: {}}})
    save_file({"a": torch.zeros(1)}, folder / "adapter" / "adapter_model.safetensors")
    return ["merge", str(folder / "adapter"), f"--output={folder / 'out'}"]


def in_shard_name(payload: str, folder: Path) -> list[str]:
    write_json(folder / "base" / "config.json", {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"})
    write_json(folder / "base" / "model.safetensors.index.json", {"weight_map": {"a": payload}})
    return ["floor", "demo", f"--model={folder / 'base'}", "--chat_format=glm-4-0414"]


def in_argument(payload: str, folder: Path) -> list[str]:
    return ["inspect", "demo", f"--train_on={payload}"]


def in_option(payload: str, folder: Path) -> list[str]:
    return ["train", f"--{payload}=1"]


PLACES = [value for name, value in list(globals().items()) if name.startswith("in_")]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_payload_is_shown_as_harmless_text(
    place: Callable[[str, Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken = 0
    for index, payload in enumerate(PAYLOADS):
        folder = tmp_path / str(index)
        folder.mkdir()
        try:
            argv = place(payload, folder)
        except UnicodeEncodeError:  # what UTF-8 cannot hold
            continue
        try:
            status = run(argv)
        except SystemExit as done:  # --print_config
            status = int(done.code or 0)
        shown = capsys.readouterr()
        assert status in (0, 1, 2)
        assert_harmless(shown.out + shown.err)
        spoken += len(shown.out + shown.err) > 0
    assert spoken >= len(PAYLOADS) - 3


@pytest.mark.parametrize("payload", PAYLOADS[:-1])
def test_printed_configuration_means_what_was_given(
    payload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(in_printed_config(payload, tmp_path))
    assert yaml.safe_load(capsys.readouterr().out)["data"] == payload


def test_run_speaks_harmlessly_of_its_folder_its_data_and_its_base(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a successful run prints, with its warnings; and merge, and explain."""
    name = "a\x1b[2J\n::error::b\u202ec##[group]"
    output, data = tmp_path / name, tmp_path / f"{name}.jsonl"
    data.write_text(json.dumps(talk(**{f"tools{name}": 1})) + "\n")
    model = shutil.copytree(base, tmp_path / f"base{name}")
    (model / "chat_template.jinja").write_text("{{ raise_exception(" + json.dumps(name) + ") }}")
    argv = ["train", f"--data={data}", "--max_steps=1", f"--output={output}", f"--model={model}"]
    argv.append("--force_format=true")  # the template contradicts every format
    assert run(argv) == 0
    assert run(["merge", str(output), f"--output={tmp_path / f'merged{name}'}"]) == 0
    assert run(["explain", str(output)]) == 0
    assert_harmless(re.sub(r"\r?Loading.*|\r?Writing.*", "", "".join(capsys.readouterr())))
