"""``glm4ft judge``: a recorded run, compared with the specification."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from glm4ft.cli.libraries import quiet_libraries
from glm4ft.cli.options import Parser
from glm4ft.cli.output import say


def parse(argv: Sequence[str]) -> Namespace:
    """Read the arguments.

    Args:
        argv: The arguments after the command's name.
    """
    parser = Parser("judge")
    parser.add_argument("recording", annotation=str, help="Folder that glm4ft record wrote.")
    parser.add_argument(
        "--model", annotation=str, default="", help="Folder of the base; by default the one that the run loaded."
    )
    parser.add_argument(
        "--data", annotation=str, default="", help="The conversations that the run trained on, to judge its rows by."
    )
    parser.add_argument("--report", annotation=str | None, help="Folder for report.html and summary.md.")
    parser.add_argument(
        "--fail_on", annotation=Literal["departure", "nothing"], default="departure", help="What gives exit status 1."
    )
    parser.add_argument("--json", nargs="?", const="-", help="Write the verdict as JSON here, or to stdout.")
    return parser.parse(argv)


def run(options: Namespace) -> bool:
    """Judge the recording.

    Args:
        options: The arguments.
    Returns:
        True if no stage departs.
    """
    quiet_libraries()
    from glm4ft.files import write_atomically
    from glm4ft.report.files import write_report
    from glm4ft.report.markdown import render_summary
    from glm4ft.testing.trial.recorded import judge_recording
    from glm4ft.testing.trial.recorded_text import content_of, lines, record
    from glm4ft.text.safe_text import json_text

    judged = judge_recording(Path(options.recording), options.model, options.data or None)
    text = json_text(record(judged), indent=1) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
    else:
        say("\n".join(lines(judged)))
        if options.json:
            write_atomically(Path(options.json), text)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if options.report or summary:
        content = content_of(judged, f"glm4ft judge {options.recording}")
        if options.report:
            print(f"report: {write_report(Path(options.report), content)}", file=sys.stderr)
        if summary:
            with Path(summary).open("a", encoding="utf-8") as file:  # that of the job, to which other steps add too
                file.write(render_summary(content) + "\n")
    return options.fail_on == "nothing" or not judged.verdict.departures
