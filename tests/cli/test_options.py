"""An option means the same on the command line and in a file; of two the later one counts, and it is known which.

Run: pytest tests/cli/test_options.py
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from glm4ft.cli import train
from glm4ft.cli.main import run
from glm4ft.cli.options import Parser
from glm4ft.errors import ConfigError
from glm4ft.train.config import TrainConfig


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parse(*argv: str, **files: str) -> Namespace:
    """The options of a training run on the demo's data; a keyword is a YAML file of that name."""
    for name, content in files.items():
        Path(f"{name}.yaml").write_text(content)
    return train.parse(["--data=demo", *argv])


def refusal(*argv: str, **files: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(*argv, **files)
    return caught.value


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning_rate=3"], "learning_rate", 3.0),
        (["--packing", "true"], "packing", True),
        (["--packing=false"], "packing", False),
        (["--max_steps=null"], "max_steps", None),
        (["--target_loss=0.01"], "target_loss", 0.01),
        (["--target_loss=1e-2"], "target_loss", 0.01),
        (["--target_loss=floor+0.01"], "target_loss", "floor+0.01"),
        (["--target_loss=null"], "target_loss", None),
        (["--report_to=[tensorboard, wandb]"], "report_to", ["tensorboard", "wandb"]),
        (["--output=2024"], "output", "2024"),
        (["--output=2024-01-01"], "output", "2024-01-01"),
        (["--output=2024-99-99"], "output", "2024-99-99"),
        (["--output=true"], "output", "true"),
        (["--output=#1"], "output", "#1"),
        (["--output='a' [b"], "output", "'a' [b"),
        (["--output", os.fsdecode(b"caf\xe9")], "output", os.fsdecode(b"caf\xe9")),
        (["--output=12:30"], "output", "12:30"),
        (["--seed=010"], "seed", 10),
        (["--seed=0x10"], "seed", 16),
        (["--seed=1_000"], "seed", 1000),
        (["--seed=1", "--seed=2"], "seed", 2),
    ],
)
def test_value_is_read_as_in_yaml_and_text_to_the_letter(argv: list[str], name: str, value: Any) -> None:
    found = getattr(parse(*argv).config, name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--lora.rank", "4"], "rank", 4),
        (["--lora={rank: 4}"], "rank", 4),
        (["--lora={rank: 4}", "--lora.rank=5"], "rank", 5),
        (["--lora.alpha", "1e1"], "alpha", 10.0),
        (["--lora.targets", "[q_proj,v_proj]"], "targets", ["q_proj", "v_proj"]),
        (["--lora.options", "{modules_to_save: [lm_head]}"], "options", {"modules_to_save": ["lm_head"]}),
        (["--lora.options.use_rslora", "true"], "options", {"use_rslora": True}),
        (["--lora.options.use_rslora=true", "--lora.options.use_rslora=false"], "options", {"use_rslora": False}),
        (
            ["--lora.options={use_rslora: true}", "--lora.options.rank_pattern.q_proj=4"],
            "options",
            {"use_rslora": True, "rank_pattern": {"q_proj": 4}},
        ),
        (["--lora.options.use_rslora=true", "--lora.options={}"], "options", {}),
    ],
)
def test_group_is_given_as_a_whole_or_by_its_parts(argv: list[str], name: str, value: Any) -> None:
    assert getattr(parse(*argv).config.lora, name) == value


def test_later_option_counts_and_its_source_is_known() -> None:
    """The parts of a group come from where each was given."""
    files = {"one": "max_steps: 1\nlora: {rank: 1, alpha: 2}\n", "two": "lora: {rank: 2}\nlearning_rate: 1e-4\n"}
    options = parse("--max_steps=5", "--seed=1", "--config=one.yaml", "--config=two.yaml", "--seed=2", **files)
    config = options.config
    assert (config.max_steps, config.lora.rank, config.lora.alpha, config.seed) == (1, 2, 2.0, 2)
    assert config.learning_rate == 1e-4
    assert options.sources == {
        "data": "command line",
        "max_steps": "one.yaml",
        "seed": "command line",
        "lora.rank": "two.yaml",
        "lora.alpha": "one.yaml",
        "learning_rate": "two.yaml",
    }


def test_source_of_a_key_is_that_of_its_field() -> None:
    """The report has one line for ``lora.options``."""
    assert parse("--lora.options.use_rslora=true").sources["lora.options"] == "command line"


def test_printed_configuration_is_one_that_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--max_steps=3", "--lora.rank=2", "--target_loss=floor+0.01", "--lora.options.use_rslora=true"]
    with pytest.raises(SystemExit) as caught:
        parse(*argv, "--print_config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["max_steps"] == 3
    output = "--output=out"
    assert parse("--config=printed.yaml", output, printed=printed).config == parse(*argv, output).config


def test_demo_runs_where_no_data_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """With what the command line changes about it."""
    config = train.parse(["--max_steps=3"]).config
    assert (config.data, config.schedule, config.max_steps) == ("demo", "constant", 3)
    assert str(train.DEMO_CONFIG) in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--config=some.yaml"], ["--data=null"]])
def test_demo_does_not_stand_in_for_data_that_a_configuration_leaves_out(argv: list[str]) -> None:
    Path("some.yaml").write_text("seed: 3\n")
    with pytest.raises(ConfigError, match="no conversations to train on"):
        train.parse(argv)


def test_resumed_run_has_the_options_it_was_started_with() -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("data: demo\noutput: elsewhere\nseed: 3\n")
    options = train.parse(["--resume", "run"])
    assert options.is_resumed
    assert options.config == TrainConfig(data="demo", output="run", seed=3)
    for argv in (["--resume=run", "--seed=4"], ["--seed=4", "--resume=run"]):
        with pytest.raises(ConfigError, match="keeps its options"):
            train.parse(argv)


@pytest.mark.parametrize(
    ("argv", "where", "found", "expected"),
    [
        (["--max_steps=3.0"], "--max_steps", "3.0", "int or null"),
        (["--max_steps=true"], "--max_steps", "true", "int or null"),
        (["--max_steps="], "--max_steps", "", "int or null"),
        (["--max_steps=1:30"], "--max_steps", "1:30", "int or null"),
        (["--epochs=true"], "--epochs", "true", "float"),
        (["--packing=1"], "--packing", "1", "true or false"),
        (["--packing"], "--packing", "", "true or false"),
        (["--schedule=cos"], "--schedule", "cos", "'cosine', 'linear', 'constant'"),
        (["--report_to=[1]"], "--report_to", "[1]", "a list, as [a,b]"),
        (["--lora.options=3"], "--lora.options", "3", "a mapping, as {a: b}"),
        (["--lora=3"], "--lora", "3", "a mapping, as {a: b}"),
    ],
)
def test_value_of_another_type_is_refused(argv: list[str], where: str, found: str, expected: str) -> None:
    error = refusal(*argv)
    assert (error.where, error.found, error.expected) == (where, found, expected)
    assert error.fix == "see glm4ft train --help"


@pytest.mark.parametrize(
    ("content", "where", "found"),
    [
        ("max_steps: many", "bad.yaml: max_steps", "many"),
        ("lora: {rank: x}", "bad.yaml: lora.rank", "x"),
        ("lora: {rank: true}", "bad.yaml: lora.rank", "True"),
        ("output: 2024", "bad.yaml: output", "2024"),
        ("3: 4", "bad.yaml", "3"),
        ("{}", "bad.yaml", "{}"),
        ("", "bad.yaml", "None"),
    ],
)
def test_value_of_another_type_is_refused_in_a_file(content: str, where: str, found: str) -> None:
    """By file and key: a value there is no text that could be read in another way."""
    error = refusal("--config=bad.yaml", bad=content)
    assert (error.where, error.found) == (where, found)


@pytest.mark.parametrize("content", ["seed: 2024-99-99", "[" * 10_000, "seed: \0"])
def test_file_that_is_no_yaml_is_refused(content: str) -> None:
    assert refusal("--config=bad.yaml", bad=content).message == "cannot read the configuration"


@pytest.mark.parametrize(
    ("argv", "found", "expected"),
    [
        (["--learn=1"], "--learn", "--learning_rate"),
        (["--max=1"], "--max", "--max_steps"),
        (["--lora.rank.x=1"], "--lora.rank.x", "--lora.rank"),
        (["--zzzzzz"], "--zzzzzz", ""),
    ],
)
def test_unknown_option_is_refused_with_the_nearest(argv: list[str], found: str, expected: str) -> None:
    """An abbreviation is unknown, too: an option that is added later could make it mean another."""
    error = refusal(*argv)
    assert (error.message, error.found, error.expected) == ("unknown option", found, expected)
    assert bool(error.fix) == (not expected)


def test_argument_given_as_an_option_is_told_how_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    """``train --data FILE`` leads to ``inspect --data FILE``."""
    assert run(["inspect", "--data", "talks.jsonl"]) == 2
    assert "it is given without a name: glm4ft inspect DATA" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["extra"], ["-x"]])
def test_argument_that_belongs_to_nothing_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--data=demo", *argv]) == 2
    assert argv[0] in capsys.readouterr().err


def test_switch_takes_no_value() -> None:
    parser = Parser("inspect")
    parser.add_argument("--boundaries", action="store_true", help="A switch.")
    with pytest.raises(ConfigError) as caught:
        parser.parse(["--boundaries=true"])
    assert caught.value.where == "--boundaries"


def test_percent_sign_in_a_help_text_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """To ``argparse`` it begins a placeholder."""
    parser = Parser("inspect")
    parser.add_argument("--share", annotation=float, default=0.5, help="100 % of it.")
    with pytest.raises(SystemExit):
        parser.parse(["--help"])
    assert "100 % of it. (float; default: 0.5)" in capsys.readouterr().out
