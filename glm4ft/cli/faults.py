"""``glm4ft faults``: known bugs in a healthy loop, each to be caught by the checks."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence

from glm4ft.cli.libraries import quiet_libraries
from glm4ft.cli.options import Parser


def parse(argv: Sequence[str]) -> Namespace:
    """Read the arguments.

    Args:
        argv: The arguments after the command's name.
    """
    parser = Parser("faults")
    parser.add_argument("ids", annotation=str, nargs="*", help="Faults and benign variations to try; by default all.")
    parser.add_argument(
        "--module", annotation=str | None, help="Module that registers further faults or variations: MODULE, or A,B."
    )
    parser.add_argument("--json", nargs="?", const="-", help="Write the results as JSON here, or to stdout.")
    parser.add_argument("--markdown", annotation=str | None, help="Write the page docs/kill-matrix.md here.")
    parser.add_argument("--practices", action="store_true", help="Try what the common practices notice, too.")
    parser.add_argument(
        "--calibrate", annotation=str | None, help="Measure the thresholds, too; write docs/thresholds.md here."
    )
    parser.add_argument("--seeds", annotation=int, default=20, help="Seeds of the calibration.")
    parser.add_argument("--workers", annotation=int | None, help="Processes; by default one per core.")
    return parser.parse(argv)


def run(options: Namespace) -> bool:
    """Try the faults, or measure the thresholds.

    Args:
        options: The arguments.
    Returns:
        False if a fault was not caught at its stage, a variation raised an alarm, or a threshold has too little room.
    """
    quiet_libraries()
    if options.module:
        from glm4ft.testing.faults.registry import EXTERNAL_MODULES, load_external

        os.environ[EXTERNAL_MODULES] = options.module
        load_external()
    from glm4ft.testing.faults.kill_matrix import show_faults

    return not show_faults(
        options.ids,
        json_file=options.json,
        markdown=options.markdown,
        calibrate=options.calibrate,
        num_seeds=options.seeds,
        practices=options.practices,
        num_workers=options.workers,
    )
