"""The command line: training, reading and judging runs, and putting pipelines and checks to the test."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence

import glm4ft
from glm4ft.cli.commands import COMMANDS
from glm4ft.cli.output import complain
from glm4ft.cli.wording import nearest
from glm4ft.errors import ConfigError, InputError, Interrupted, RunError

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status: 0 done, 1 the run failed, 2 bad input, 130 or 143 interrupted.

    Args:
        argv: The arguments without the program's name; by default those of this process.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def _interrupt(number: int, _: object) -> None:
    raise Interrupted(number)


def run(argv: Sequence[str]) -> int:
    """Run one command; every error a user can cause is one block on stderr.

    Args:
        argv: The arguments without the program's name.
    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        # a terminal or a pipe of another encoding shows escapes; it must not end the command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _dispatch(argv)
    except InputError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except RunError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt as error:
        # as a shell reports a process that a signal has ended
        return _fail("interrupted", 128 + getattr(error, "signal_number", signal.SIGINT))
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


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else EXIT_BAD_INPUT
    if argv[0] == "--version":
        print(f"glm4ft {glm4ft.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        expected = nearest(argv[0], COMMANDS) or " or ".join(sorted(COMMANDS))
        raise ConfigError("unknown command", found=argv[0], expected=expected)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)\b")
    command = importlib.import_module(COMMANDS[argv[0]].module)
    return 0 if command.run(command.parse(argv[1:])) else EXIT_FAILED


def _overview() -> str:
    usage = f"usage: glm4ft {{{','.join(COMMANDS)}}} ...\n\n{glm4ft.__doc__}\n"
    lines = [f"  glm4ft {name:<8} {command.description}" for name, command in COMMANDS.items()]
    return "\n".join([usage, *lines, "\n`glm4ft COMMAND --help` lists a command's options."])


def _fail(text: str, status: int) -> int:
    complain(f"glm4ft: error: {text}")
    return status


def _os_error_fix(error: OSError) -> str:
    if error.errno == 28:  # ENOSPC
        return "free some space on the disk; files that were complete before are untouched"
    return ""
