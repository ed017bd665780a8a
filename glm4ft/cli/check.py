"""``glm4ft check``: a fine-tuning pipeline on trial."""

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
    parser = Parser("check")
    parser.add_argument(
        "--subject",
        annotation=str,
        default="glm4ft.testing.subjects.own:Subject",
        help="MODULE:ATTR of the pipeline.",
    )
    parser.add_argument(
        "--model",
        annotation=str,
        default="tiny",
        help="Base: tiny, tiny-glm4-ids (with GLM-4's ids), tiny:FORMAT (of a chat format: tiny:glm-4.7), or a folder.",
    )
    parser.add_argument("--stages", annotation=str | None, help="Stages to judge, as rows,outcome; by default all.")
    parser.add_argument("--json", nargs="?", const="-", help="Write the results as JSON here, or to stdout.")
    parser.add_argument("--report", annotation=str | None, help="Folder for report.html and summary.md.")
    return parser.parse(argv)


def run(options: Namespace) -> bool:
    """Judge the pipeline.

    Args:
        options: The arguments.
    Returns:
        True if no check failed.
    """
    quiet_libraries()
    from glm4ft.testing.checks import all_checks
    from glm4ft.testing.trial.command import show_checks
    from glm4ft.testing.trial.stages import STAGES

    stages = options.stages.split(",") if options.stages is not None else STAGES
    report = Path(options.report) if options.report else None
    return not show_checks(
        options.subject, all_checks(), base=options.model, stages=stages, json_file=options.json, report=report
    )
