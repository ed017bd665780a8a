"""``glm4ft init``: another repository's trainer on trial."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from glm4ft.cli.options import Parser
from glm4ft.cli.output import say


def parse(argv: Sequence[str]) -> Namespace:
    """Read the arguments.

    Args:
        argv: The arguments after the command's name.
    """
    parser = Parser("init")
    parser.add_argument("folder", annotation=str, help="The repository; is made if need be.")
    parser.add_argument(
        "--trainer", annotation=str | None, help="transformers, trl, llamafactory, swift or loop; else looked for."
    )
    parser.add_argument(
        "--name", annotation=str | None, help="The pipeline's name in reports; by default the folder's."
    )
    parser.add_argument(
        "--requirement", annotation=str | None, help="How glm4ft is installed there; by default as it was here."
    )
    return parser.parse(argv)


def run(options: Namespace) -> bool:
    """Render the template, and say what was done.

    Args:
        options: The arguments.
    """
    from glm4ft.init_command.rendering import describe_rendering

    folder, required = Path(options.folder), options.requirement
    say(describe_rendering(folder, trainer=options.trainer, name=options.name, required=required))
    return True
