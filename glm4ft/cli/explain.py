"""``glm4ft explain``: why the loss of a run does not fall, or why its model does not stop."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from glm4ft.cli.libraries import quiet_libraries
from glm4ft.cli.options import Parser


def parse(argv: Sequence[str]) -> Namespace:
    """Read the arguments.

    Args:
        argv: The arguments after the command's name.
    """
    parser = Parser("explain")
    parser.add_argument(
        "run",
        annotation=str,
        help="Folder of a run; of another trainer: with trainer_state.json or an adapter.",
    )
    parser.add_argument(
        "--data", annotation=str | None, help="JSONL of conversations, if not those that the run names."
    )
    parser.add_argument(
        "--rows", annotation=str | None, help="Rows as trained, in the form of inspect --json; ours keep them."
    )
    parser.add_argument("--model", annotation=str | None, help="Base, if not the one that run or adapter name.")
    parser.add_argument("--chat_format", annotation=str | None, help="As in train; by default the base's.")
    parser.add_argument("--force_format", annotation=bool, default=False, help="As in train.")
    parser.add_argument("--json", nargs="?", const="-", help="Write the diagnosis as JSON here, or to stdout.")
    return parser.parse(argv)


def run(options: Namespace) -> bool:
    """Show the diagnosis.

    Args:
        options: The arguments.
    """
    quiet_libraries()
    from glm4ft.diagnosis.run_folder import explain_run
    from glm4ft.report.diagnosis_view import show_diagnosis

    diagnosis = explain_run(
        Path(options.run),
        data=options.data,
        rows=options.rows,
        model=options.model,
        chat_format=options.chat_format,
        force_format=options.force_format,
    )
    show_diagnosis(diagnosis, json_file=options.json)
    return True
