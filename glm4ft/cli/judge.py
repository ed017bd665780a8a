"""``glm4ft judge``: a recorded run, compared with the specification."""

from __future__ import annotations

import json
import sys
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
    parser = Parser("judge")
    parser.add_argument("recording", annotation=str, help="Folder that glm4ft record wrote.")
    parser.add_argument(
        "--model", annotation=str, default="", help="Folder of the base; by default the one that the run loaded."
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
    from glm4ft.testing.trial.recorded import judge_recording
    from glm4ft.testing.trial.recorded_text import lines, record

    judged = judge_recording(Path(options.recording), options.model)
    text = json.dumps(record(judged), ensure_ascii=False, indent=1) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
    else:
        say("\n".join(lines(judged)))
        if options.json:
            write_atomically(Path(options.json), text)
    return not judged.verdict.departures
