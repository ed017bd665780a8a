"""The command line: training, reading and judging runs, and putting pipelines and checks to the test."""

from __future__ import annotations

import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

import glm4ft
from glm4ft.cli.options import config_files, nearest, new_parser, parse, with_underscores, yaml_keys
from glm4ft.errors import ConfigError, InputError, RunError

if TYPE_CHECKING:
    from glm4ft.data.chat_format import ChatFormat
    from glm4ft.train.config import TrainConfig

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
DEMO_CONFIG = Path(glm4ft.__file__).parent / "demo" / "demo.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status: 0 done, 1 the run failed, 2 bad input."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run one command; every error a user can cause is one block on stderr.

    Args:
        argv: arguments without the program's name; ``--learning-rate`` and ``--learning_rate`` are the same.
    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        # a terminal or a pipe of another encoding shows escapes; it must not end the command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _dispatch([with_underscores(arg) for arg in argv])
    except InputError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except RunError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # the reader has seen enough; keep the interpreter from complaining when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        facts = InputError(error.strerror or str(error), where=str(error.filename or ""), fix=_os_error_fix(error))
        return _fail(str(facts), EXIT_BAD_INPUT)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        fix = "hide the device, by CUDA_VISIBLE_DEVICES=, to run on the CPU"
        if argv[:1] == ["train"]:
            fix = "lower --micro_batch_size or --max_length, or switch on --gradient_checkpointing"
        return _fail(str(InputError("the device is out of memory", found=str(error)[:200], fix=fix)), EXIT_FAILED)


def _dispatch(argv: list[str]) -> int:
    parsers = {
        "train": _train_parser,
        "inspect": _inspect_parser,
        "floor": _floor_parser,
        "explain": _explain_parser,
        "merge": _merge_parser,
        "check": _check_parser,
        "faults": _faults_parser,
        "init": _init_parser,
    }
    commands: dict[str, Callable[[Namespace], int]] = {
        "train": _train,
        "inspect": _inspect,
        "floor": _floor,
        "explain": _explain_run,
        "merge": _merge,
        "check": _check,
        "faults": _faults,
        "init": _init,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: glm4ft {{{','.join(parsers)}}} ...\n\n{glm4ft.__doc__}\n")
        print("\n".join(f"  glm4ft {name:<8} {make().description}" for name, make in parsers.items()))
        print("\n`glm4ft COMMAND --help` lists a command's options.")
        return 0 if argv else EXIT_BAD_INPUT
    if argv[0] == "--version":
        print(f"glm4ft {glm4ft.__version__}")
        return 0
    if argv[0] not in parsers:
        raise ConfigError("unknown command", found=argv[0], expected=nearest(argv[0], parsers))
    _quiet_libraries()
    return commands[argv[0]](parse(parsers[argv[0]](), argv[1:]))


# --- train ---


def _train_parser() -> ArgumentParser:
    from glm4ft.train.config import TrainConfig

    parser = new_parser("train", "Train a LoRA adapter; without --data and --config, on the bundled demo.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("--resume", type=str, help="Continue the run in this folder; takes no other option.")
    parser.add_class_arguments(TrainConfig)
    return parser


def _train(options: Namespace) -> int:
    from glm4ft.train.run import is_run, run_training

    config, sources = _resumed_config(options) if options.resume else _config(options)
    is_resumed = bool(options.resume)
    try:
        result = run_training(config, resume=is_resumed, say=lambda line: print(line, flush=True), sources=sources)
    except KeyboardInterrupt:
        if is_run(Path(str(config.output))):  # there is none yet while the conversations are encoded
            again = shlex.quote(str(config.output))
            print(f"\nto go on after the last checkpoint: glm4ft train --resume {again}", file=sys.stderr)
        raise
    if int(os.environ.get("RANK", "0")) == 0:
        print(result.describe())
    return 0 if result.reached_target and result.came_back else EXIT_FAILED


def _config(options: Namespace) -> tuple[TrainConfig, dict[str, str]]:
    """The options of a run, and where each that was given came from."""
    from glm4ft.train.config import TrainConfig
    from glm4ft.train.run import new_output

    if options.data is None and not options.config:
        print(f"no --data and no --config: running the demo, {DEMO_CONFIG}")
        options = parse(_train_parser(), [f"--config={DEMO_CONFIG}", *options.argv])
    values = {field.name: options[field.name] for field in fields(TrainConfig)}
    if values["data"] is None:
        raise ConfigError("no conversations to train on", where="--data", expected="a JSONL file, or 'demo'")
    if values["output"] is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several processes need one folder to write to", where="--output", fix="name it")
    values["output"] = values["output"] or new_output()
    files = {key: str(path) for path in config_files(options.argv) for key in yaml_keys(path)}
    flags = {arg.removeprefix("--").partition("=")[0]: "command line" for arg in options.argv if arg.startswith("--")}
    return TrainConfig(**values), files | flags


def _resumed_config(options: Namespace) -> tuple[TrainConfig, dict[str, str]]:
    from glm4ft.train.run import CONFIG_FILE

    path = Path(options.resume) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError("there is no run to resume", where="--resume", found=f"no {path}")
    if len(options.argv) > 2 or (len(options.argv) == 2 and options.argv[0] != "--resume"):
        raise ConfigError(
            "a resumed run keeps its options",
            where="--resume",
            found=" ".join(options.argv),
            expected=f"--resume {options.resume} alone",
            fix="start a new run to change options",
        )
    return _config(parse(_train_parser(), [f"--config={path}", f"--output={options.resume}"]))


# --- inspect ---


def _inspect_parser() -> ArgumentParser:
    parser = new_parser("inspect", "Show which tokens of each conversation are supervised.")
    _add_format_options(parser)
    parser.add_argument("--boundaries", action="store_true", help="Show the tokens around each turn's start and end.")
    parser.add_argument("--limit", type=int, default=10, help="Conversations to show; all of them are counted.")
    parser.add_argument("--json", nargs="?", const="-", help="Write a JSON line per conversation here, or to stdout.")
    return parser


def _add_format_options(parser: ArgumentParser) -> None:
    from glm4ft.train.config import TrainConfig

    default = TrainConfig()
    parser.add_argument("data", type=str, help="JSONL of conversations, or 'demo'.")
    parser.add_argument("--model", type=str, default=default.model, help="Base whose tokenizer and template are used.")
    parser.add_argument("--chat_format", type=str, help="glm-4-9b-chat or glm-4-0414; by default the base's.")
    parser.add_argument("--max_length", type=int, default=default.max_length, help="Longest row, in tokens.")
    parser.add_argument("--train_on", type=Literal["all", "last"], default=default.train_on, help="As in train.")
    parser.add_argument(
        "--final_stop", type=Literal["role", "endoftext"], default=default.final_stop, help="As in train."
    )
    parser.add_argument("--allow_nonstop_terminator", type=bool, default=False, help="As in train.")


def _chat_format(options: Namespace, format_name: str | None) -> ChatFormat:
    from glm4ft.data.chat_format import ChatFormat
    from glm4ft.model.base_model import load_format

    tokenizer, name = load_format(options.model, format_name)
    return ChatFormat(
        name,
        tokenizer,
        final_stop=options.final_stop,
        train_on=options.train_on,
        allow_nonstop_terminator=options.allow_nonstop_terminator,
    )


def _inspect(options: Namespace) -> int:
    from glm4ft.data.dataset import data_path
    from glm4ft.report.inspection import inspect_conversations
    from glm4ft.train.config import TrainConfig

    if options.limit < 0:
        raise ConfigError("option out of range", where="--limit", found=str(options.limit), expected="at least 0")
    max_length = TrainConfig(max_length=options.max_length).max_length
    inspect_conversations(
        data_path(options.data),
        _chat_format(options, options.chat_format),
        max_length=max_length,
        boundaries=options.boundaries,
        limit=options.limit,
        json_file=options.json,
    )
    return 0


# --- floor ---


def _floor_parser() -> ArgumentParser:
    parser = new_parser("floor", "Say, before training, how low the loss can go, and which tokens keep it up.")
    _add_format_options(parser)
    parser.add_argument("--dtype", type=Literal["fp32", "bf16"], default="fp32", help="Forward passes to certify for.")
    parser.add_argument(
        "--frozen_head", type=bool, default=True, help="false: head or final norm are trained; entropy alone is left."
    )
    parser.add_argument("--json", nargs="?", const="-", help="Write the floor as JSON here, or to stdout.")
    return parser


def _floor(options: Namespace) -> int:
    from glm4ft.data.dataset import data_path
    from glm4ft.floors.head import format_of, read_head
    from glm4ft.report.floor_view import show_floor
    from glm4ft.train.config import TrainConfig

    max_length = TrainConfig(max_length=options.max_length).max_length
    show_floor(
        data_path(options.data),
        # by config.json alone: of a quantised base too, which cannot be trained here
        _chat_format(options, options.chat_format or format_of(options.model)),
        read_head(options.model) if options.frozen_head else None,
        max_length=max_length,
        bf16=options.dtype == "bf16",
        json_file=options.json,
    )
    return 0


# --- explain ---


def _explain_parser() -> ArgumentParser:
    parser = new_parser("explain", "Say why the loss of a run does not fall, or why its model does not stop.")
    parser.add_argument(
        "run", type=str, help="Folder of a run; of another trainer: with trainer_state.json or an adapter."
    )
    parser.add_argument("--data", type=str, help="JSONL of conversations, if not those that the run names.")
    parser.add_argument("--rows", type=str, help="Rows as trained, in the form of inspect --json; ours keep them.")
    parser.add_argument("--model", type=str, help="Base, if not the one that run or adapter name.")
    parser.add_argument("--chat_format", type=str, help="glm-4-9b-chat or glm-4-0414; by default the base's.")
    parser.add_argument("--json", nargs="?", const="-", help="Write the diagnosis as JSON here, or to stdout.")
    return parser


def _explain_run(options: Namespace) -> int:
    from glm4ft.diagnosis.run_folder import explain_run
    from glm4ft.report.diagnosis_view import show_diagnosis

    names = {name: options[name] for name in ("data", "rows", "model", "chat_format")}
    diagnosis = explain_run(Path(options.run), **names)
    show_diagnosis(diagnosis, json_file=options.json)
    return 0


# --- merge ---


def _merge_parser() -> ArgumentParser:
    parser = new_parser("merge", "Merge an adapter into its base, for plain transformers.")
    parser.add_argument("adapter", type=str, help="Output folder of a run, or any PEFT adapter of a GLM-4.")
    parser.add_argument("--output", type=str, required=True, help="Folder for the merged checkpoint.")
    parser.add_argument("--model", type=str, help="Base checkpoint, if not the one that the adapter names.")
    parser.add_argument("--dtype", type=str, default="auto", help="bf16 or fp32; auto: as the base is stored.")
    return parser


def _merge(options: Namespace) -> int:
    from glm4ft.model.merge import merge_adapter

    report = merge_adapter(Path(options.adapter), Path(options.output), model=options.model, dtype=options.dtype)
    print(report.describe())
    return 0


# --- check ---


def _check_parser() -> ArgumentParser:
    parser = new_parser("check", "Put a fine-tuning pipeline on trial; by default, this project's own.")
    parser.add_argument(
        "--subject", type=str, default="glm4ft.testing.subjects.own:Subject", help="MODULE:ATTR of the pipeline."
    )
    parser.add_argument("--stages", type=str, help="Stages to judge, as rows,outcome; by default all.")
    parser.add_argument("--json", nargs="?", const="-", help="Write the results as JSON here, or to stdout.")
    parser.add_argument("--report", type=str, help="Folder for report.html and summary.md.")
    return parser


def _check(options: Namespace) -> int:
    from glm4ft.testing.checks import all_checks
    from glm4ft.testing.trial.command import show_checks
    from glm4ft.testing.trial.stages import STAGES

    stages = options.stages.split(",") if options.stages is not None else STAGES
    report = Path(options.report) if options.report else None
    has_failed = show_checks(options.subject, all_checks(), stages=stages, json_file=options.json, report=report)
    return EXIT_FAILED if has_failed else 0


# --- faults ---


def _faults_parser() -> ArgumentParser:
    from glm4ft.testing.faults.command import add_options

    parser = new_parser("faults", "Prove the checks: put known bugs into a healthy loop and see that each is caught.")
    add_options(parser)
    return parser


def _faults(options: Namespace) -> int:
    from glm4ft.testing.faults.command import run_command

    return EXIT_FAILED if run_command(options) else 0


# --- init ---


def _init_parser() -> ArgumentParser:
    parser = new_parser(
        "init", "Render adapter, tests, tox.ini and workflows into a repository, to put its trainer on trial."
    )
    parser.add_argument("folder", type=str, help="The repository; is made if need be.")
    parser.add_argument("--trainer", type=str, help="transformers, trl, llamafactory, swift or loop; else looked for.")
    parser.add_argument("--name", type=str, help="The pipeline's name in reports; by default the folder's.")
    return parser


def _init(options: Namespace) -> int:
    from glm4ft.init_command import describe_rendering

    print(describe_rendering(Path(options.folder), trainer=options.trainer, name=options.name))
    return 0


# --- what people see ---


def _quiet_libraries() -> None:
    """Leave the screen to the account of the run: errors of the libraries still show."""
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|jsonargparse)\b")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _fail(text: str, status: int) -> int:
    print(f"glm4ft: error: {text}", file=sys.stderr)
    return status


def _os_error_fix(error: OSError) -> str:
    if error.errno == 28:  # ENOSPC
        return "free some space on the disk; files that were complete before are untouched"
    return ""
