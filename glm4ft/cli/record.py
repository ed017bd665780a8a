"""``glm4ft record``: the first optimizer steps of any training command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from glm4ft.cli.options import Parser
from glm4ft.errors import ConfigError
from glm4ft.folders import require_unused
from glm4ft.testing.baseline.repository import commit, uncommitted
from glm4ft.testing.recording import environment


def parse(argv: Sequence[str]) -> Namespace:
    """Read the arguments.

    Args:
        argv: The arguments after the command's name; the training command follows ``--``.
    """
    end = list(argv).index("--") if "--" in argv else len(argv)
    own, command = argv[:end], list(argv[end + 1 :])
    parser = Parser("record", usage="glm4ft record [--steps N] [--modules E,N,H] [--output DIR] -- COMMAND ...")
    parser.add_argument("--steps", annotation=int, default=environment.DEFAULT_STEPS, help="Optimizer steps to record.")
    parser.add_argument(
        "--modules",
        annotation=str,
        default="",
        help="Names of embedding, final norm and head, with commas, for a model that is not of transformers.",
    )
    parser.add_argument("--output", annotation=str, default="recording", help="Folder for the recording.")
    options = parser.parse(own)
    if not command:
        raise ConfigError("there is no command to record", expected="glm4ft record -- python train.py")
    if options.steps < 1:
        raise ConfigError("option out of range", where="--steps", found=str(options.steps), expected="at least 1")
    options.command = command
    return options


def run(options: Namespace) -> bool:
    """Run the command with the recorder in its Python processes; exits with the command's status.

    Args:
        options: The arguments.
    """
    folder = Path(options.output).absolute()
    require_unused(folder)
    folder.mkdir(parents=True, exist_ok=True)
    inject = Path(__file__).parents[1] / "testing" / "recording" / "inject"
    path = os.pathsep.join([str(inject), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {
        **os.environ, "PYTHONPATH": path, environment.FOLDER: str(folder), environment.STEPS: str(options.steps),
        environment.MODULES: options.modules, environment.COMMAND: shlex.join(options.command),
        environment.COMMIT: _commit(),
    }  # fmt: skip
    try:
        status = subprocess.call(options.command, env=variables)
    except FileNotFoundError:
        raise ConfigError("no such command", found=options.command[0]) from None
    ranks = sorted(folder.glob("rank-*/trace.json"))
    say = f"recorded {len(ranks)} process{'es' * (len(ranks) != 1)} in {options.output}: glm4ft judge {options.output}"
    print(f"glm4ft: {say}" if ranks else f"glm4ft: nothing was recorded in {options.output}", file=sys.stderr)
    sys.exit(status if status >= 0 else 128 - status)


def _commit() -> str:
    """The commit of the working directory's repository, marked if files differ from it; "" without one."""
    here = Path.cwd()
    return commit(here) + environment.UNCOMMITTED * bool(uncommitted(here))
