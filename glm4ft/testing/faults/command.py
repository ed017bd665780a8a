"""The options of ``glm4ft faults``; what is heavy is imported when the command runs."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace


def add_options(parser: ArgumentParser) -> None:
    """Give a parser the command's options."""
    parser.add_argument("ids", type=str, nargs="*", help="Faults and benign variations to try; by default all.")
    parser.add_argument("--json", nargs="?", const="-", help="Write the results as JSON here, or to stdout.")
    parser.add_argument("--markdown", type=str, help="Write the page docs/kill-matrix.md here.")
    parser.add_argument("--practices", action="store_true", help="Try what the common practices notice, too.")
    parser.add_argument("--calibrate", type=str, help="Measure the thresholds instead; write the page here.")
    parser.add_argument("--seeds", type=int, default=20, help="Of the calibration.")
    parser.add_argument("--workers", type=int, help="Processes; by default one per core.")


def run_command(options: Namespace) -> bool:
    """Run the command.

    Args:
        options: as parsed.
    Returns:
        True if a fault was not caught at its stage, a variation raised an alarm, or a threshold has too little room.
    """
    if options.calibrate:
        from glm4ft.testing.faults.calibration import show_calibration

        return show_calibration(options.ids, options.calibrate, num_seeds=options.seeds, num_workers=options.workers)
    from glm4ft.testing.faults.kill_matrix import show_faults

    return show_faults(
        options.ids,
        json_file=options.json,
        markdown=options.markdown,
        practices=options.practices,
        num_workers=options.workers,
    )
