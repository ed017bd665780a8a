"""``glm4ft train``: a LoRA adapter from conversations."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import glm4ft
from glm4ft.cli.dataclass_options import COMMAND_LINE, DataclassParser, Given, nested
from glm4ft.cli.libraries import quiet_libraries
from glm4ft.cli.output import complain, say
from glm4ft.data.inputs import data_inputs
from glm4ft.errors import ConfigError, harmless
from glm4ft.model.lora_options import LoraOptions
from glm4ft.train.config import TrainConfig
from glm4ft.train.run_folder import CONFIG_FILE, is_run, new_output

DEMO_CONFIG = Path(glm4ft.__file__).parent / "demo" / "demo.yaml"


def parse(argv: Sequence[str]) -> Namespace:
    """Read and check the arguments.

    Args:
        argv: The arguments after the command's name.
    Returns:
        The options of the run as ``config``, where those that were given came from as ``sources``, and
        ``is_resumed``.
    """
    options = _parser().parse(argv)
    is_resumed = options.resume is not None
    given = _given_to_run(options.resume, argv) if is_resumed else options.given
    if not any(option.name == "data" or option.source != COMMAND_LINE for option in given):
        say(f"no --data and no --config: running the demo, {DEMO_CONFIG}")
        given = _parser().parse([f"--config={DEMO_CONFIG}"]).given + given
    values = nested(given)
    if options.print_config:
        print(_as_yaml(_config(values)), end="")
        raise SystemExit(0)
    _check_files(values)
    values["output"] = values.get("output") or new_output()
    return Namespace(
        config=_config(values), sources={option.name: option.source for option in given}, is_resumed=is_resumed
    )


def run(options: Namespace) -> bool:
    """Train, and say what came of it.

    Args:
        options: The result of ``parse``.
    Returns:
        True if the run reached its target loss and reproduced its turns, as far as it was to do so.
    """
    quiet_libraries()
    from glm4ft.report.observed_run import train_observed

    try:
        result = train_observed(
            options.config,
            resume=options.is_resumed,
            say=say,
            sources=options.sources,
        )
    except KeyboardInterrupt:
        output = Path(options.config.output)
        if (
            is_run(output) and int(os.environ.get("RANK", "0")) == 0
        ):  # there is none yet while the conversations are encoded
            again = shlex.quote(str(output))
            complain(f"\nto go on after the last checkpoint: glm4ft train --resume {again}")
        raise
    if int(os.environ.get("RANK", "0")) == 0:
        say(result.describe())
    return result.reached_target and result.is_reproduced


def _parser() -> DataclassParser:
    parser = DataclassParser("train")
    parser.add_argument(
        "--resume", annotation=str | None, help="Continue the run in this folder; takes no other option."
    )
    parser.add_argument("--print_config", action="store_true", help="Print all options as a YAML file, and exit.")
    parser.add_file_option("--config", help="YAML file with any of the options below.")
    parser.add_fields(TrainConfig)
    return parser


def _config(values: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{**values, "lora": LoraOptions(**values.get("lora", {}))})


def _as_yaml(config: TrainConfig) -> str:
    """The options as YAML that is harmless on a terminal, and means the same."""
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    if harmless(text) == text:
        return text
    # every string on one line and in double quotes, which know escapes
    text = yaml.safe_dump(asdict(config), sort_keys=False, default_style='"', width=2**31)
    return text.replace("##", "\\x23#")


def _given_to_run(folder: str, argv: Sequence[str]) -> list[Given]:
    """The options that a run to resume was started with."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        fix = "name the folder of a run, or restore the file from a copy"
        raise ConfigError("there is no run to resume", where="--resume", found=f"no {path}", fix=fix)
    if len(argv) > 2 or (len(argv) == 2 and argv[0] != "--resume"):
        raise ConfigError(
            "a resumed run keeps its options",
            where="--resume",
            found=" ".join(argv),
            expected=f"--resume {folder} alone",
            fix="start a new run to change options",
        )
    options = _parser().parse([f"--config={path}"])
    return [*options.given, Given("output", folder, COMMAND_LINE)]


def _check_files(values: dict[str, Any]) -> None:
    """Refuse what can be refused at once, before anything slow is imported."""
    if values.get("data") is None:
        raise ConfigError("no conversations to train on", where="--data", expected="a JSONL file, or 'demo'")
    data_inputs(values["data"])
    if values.get("eval_data") is not None:
        data_inputs(values["eval_data"])
    if values.get("output") is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several processes need one folder to write to", where="--output", fix="name it")
