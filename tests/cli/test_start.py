"""The command line starts at once: what needs no training library loads none, and every command is in the table.

Run: pytest tests/cli/test_start.py
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from glm4ft.cli.commands import COMMANDS
from glm4ft.cli.main import run
from glm4ft.model.lora_options import LoraOptions
from glm4ft.train.config import TrainConfig

SLOW = {"torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "rich", "hypothesis", "pytest", "copier"}
STARTED = """
import json, sys
from glm4ft.cli.main import run
try:
    status = run(sys.argv[1:])
except SystemExit as error:
    status = error.code
print(json.dumps([status, sorted(sys.modules)]))
"""


def start(*argv: str, folder: Path) -> tuple[int, set[str], str]:
    """Exit status, loaded modules and stderr of a command in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-c", STARTED, *argv], cwd=folder, capture_output=True, text=True, check=True
    )
    status, modules = json.loads(process.stdout.splitlines()[-1])
    return status, {name.partition(".")[0] for name in modules}, process.stderr


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_loads_nothing_slow(argv: list[str], tmp_path: Path) -> None:
    status, modules, _ = start(*argv, folder=tmp_path)
    assert (status, modules & SLOW) == (0, set())


def test_overview_and_version_load_no_parser(tmp_path: Path) -> None:
    for flag in ("--help", "--version"):
        assert not start(flag, folder=tmp_path)[1] & {"argparse", "pydantic", "yaml", "docstring_parser"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "unknown command"),
        (["train", "--learning-rat=1"], "--learning_rate"),
        (["train", "--max_steps=many"], "int or null"),
        (["train", "--max_steps=0"], "more than 0"),
        (["train", "--lora.rank=x"], "--lora.rank"),
        (["inspect"], "data"),
        (["inspect", "demo", "--limit=x"], "--limit"),
        (["floor", "demo", "--dtype=int8"], "'fp32', 'bf16'"),
        (["explain", "run", "--jsn"], "--json"),
        (["merge", "adapter"], "--output"),
        (["check", "--subjects=x"], "--subject"),
        (["faults", "--seeds=x"], "--seeds"),
        (["init"], "folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_error_loads_nothing_slow(argv: list[str], says: str, tmp_path: Path) -> None:
    status, modules, error = start(*argv, folder=tmp_path)
    assert (status, modules & SLOW) == (2, set())
    assert says in error


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--data=none.jsonl"],
        ["train", "--data=demo", "--eval_data=none.jsonl"],
        ["inspect", "none.jsonl"],
        ["floor", "none.jsonl"],
    ],
    ids=" ".join,
)
def test_missing_data_file_is_refused_before_anything_slow_is_loaded(argv: list[str], tmp_path: Path) -> None:
    status, modules, error = start(*argv, folder=tmp_path)
    assert (status, modules & SLOW) == (2, set())
    assert error.splitlines() == [
        "glm4ft: error: a file cannot be read: No such file or directory",
        "  where:    none.jsonl",
        "  found:    'none.jsonl'",
        "  expected: a file that can be read",
        "  fix:      check the path; a data set of the hub is named org/name",
    ]


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  glm4ft {name:<8} {command.description}\n" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_module_of_a_command_is_in_the_table(name: str) -> None:
    module = importlib.import_module(COMMANDS[name].module)
    assert callable(module.parse)
    assert callable(module.run)


@pytest.mark.parametrize(("record", "prefix"), [(TrainConfig, ""), (LoraOptions, "lora.")])
def test_help_of_train_explains_every_field(
    record: type, prefix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first line of its entry in the docstring."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        run(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(record):
        entry = str(record.__doc__).split(f"    {field.name}: ")[1].split("\n")[0]
        assert f"--{prefix}{field.name} {field.name.upper()} {entry.replace('``', '`')}" in shown
