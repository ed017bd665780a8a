"""``glm4ft merge``: an adapter into its base, for plain transformers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from glm4ft.cli.libraries import quiet_libraries
from glm4ft.cli.options import Parser
from glm4ft.cli.output import say


def parse(argv: Sequence[str]) -> Namespace:
    """Read the arguments.

    Args:
        argv: The arguments after the command's name.
    """
    parser = Parser("merge")
    parser.add_argument("adapter", annotation=str, help="Output folder of a run, or any PEFT adapter of a GLM-4.")
    parser.add_argument("--output", annotation=str, required=True, help="Folder for the merged checkpoint.")
    parser.add_argument(
        "--model", annotation=str | None, help="Base checkpoint, if not the one that the adapter names."
    )
    parser.add_argument("--dtype", annotation=str, default="auto", help="bf16 or fp32; auto: as the base is stored.")
    return parser.parse(argv)


def run(options: Namespace) -> bool:
    """Write the merged checkpoint.

    Args:
        options: The arguments.
    """
    quiet_libraries()
    from glm4ft.model.merge import merge_adapter

    report = merge_adapter(Path(options.adapter), Path(options.output), model=options.model, dtype=options.dtype)
    say(report.describe())
    return True
