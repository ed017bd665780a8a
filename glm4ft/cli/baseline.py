"""``glm4ft baseline``: curves that are kept, and compared with those of today's code."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4ft.cli.libraries import quiet_libraries
from glm4ft.cli.options import Parser
from glm4ft.cli.wording import nearest
from glm4ft.errors import ConfigError

if TYPE_CHECKING:
    from glm4ft.testing.baseline.baseline_file import Baseline

OWN = "glm4ft.testing.subjects.own:Subject"
ACTIONS = {
    "record": "Train with several seeds and keep the curves of loss, gradient norm and learning rate.",
    "compare": "Train again with the same seeds and say whether the curves are still the same.",
    "history": "Draw the curves of several recorded files over their commits.",
}


def parse(argv: Sequence[str]) -> Namespace:
    """Read the arguments.

    Args:
        argv: The arguments after the command's name; the first is one of ``ACTIONS``.
    Raises:
        ConfigError: If it is none.
    """
    action = argv[0] if argv else ""
    if action in ("-h", "--help"):
        lines = [f"  glm4ft baseline {name:<8} {told}" for name, told in ACTIONS.items()]
        print("\n".join([f"usage: glm4ft baseline {{{','.join(ACTIONS)}}} ...\n", *lines]))
        sys.exit(0)
    if action not in ACTIONS:
        expected = nearest(action, ACTIONS) or " or ".join(ACTIONS)
        raise ConfigError("no such action of glm4ft baseline", found=action or "none", expected=expected)
    parser = Parser("baseline")
    parser.prog, parser.description = f"glm4ft baseline {action}", ACTIONS[action]
    _OPTIONS[action](parser)
    options = parser.parse(argv[1:])
    options.action = action
    return options


def _record_options(parser: Parser) -> None:
    parser.add_argument("--output", annotation=str, required=True, help="File to write, ending in .jsonl.")
    parser.add_argument("--subject", annotation=str | None, help=f"MODULE:ATTR of the pipeline; by default {OWN}.")
    parser.add_argument(
        "--model", annotation=str | None, help="Base: tiny (the default), tiny:FORMAT, random:NAME, a folder or hub id."
    )
    parser.add_argument("--seeds", annotation=int | None, help="Number of seeds, 5 to 14; 8 by default.")
    parser.add_argument("--steps", annotation=int | None, help="Optimizer steps of each run; 10 by default.")
    parser.add_argument("--packing", annotation=bool | None, help="Whether rows are packed; false by default.")
    _recordings_option(parser)
    parser.add_argument("--repeat", annotation=str | None, help="Folder of a second recording of the first run.")


def _recordings_option(parser: Parser) -> None:
    parser.add_argument(
        "--recordings", annotation=str, nargs="+", default=[],
        help="Folders of glm4ft record, one for each seed, in place of a subject.",
    )  # fmt: skip


def _compare_options(parser: Parser) -> None:
    parser.add_argument(
        "files", annotation=str, nargs="+", help="Files that glm4ft baseline record wrote, or folders of them."
    )
    _recordings_option(parser)
    parser.add_argument("--model", annotation=str, default="", help="Folder of the base that recorded runs loaded.")
    parser.add_argument("--keep", annotation=str | None, help="Folder for the curves of today, for the history.")
    parser.add_argument("--json", nargs="?", const="-", help="Write the results as JSON here, or to stdout.")


def _history_options(parser: Parser) -> None:
    parser.add_argument(
        "files",
        annotation=str,
        nargs="+",
        help="Files of one baseline, recorded at several commits, or folders of them.",
    )
    parser.add_argument("--report", annotation=str | None, help="Folder for history.html.")


_OPTIONS = {"record": _record_options, "compare": _compare_options, "history": _history_options}


def run(options: Namespace) -> bool:
    """Record, compare or draw.

    Args:
        options: The arguments.
    Returns:
        False if a comparison is an alarm.
    """
    if options.action != "history":
        quiet_libraries()
    return {"record": _record, "compare": _compare, "history": _history}[options.action](options)


def _record(options: Namespace) -> bool:
    output = Path(options.output)
    found = _recorded(output, options) if options.recordings else _run(output, options)
    ends = [curve.steps[-1].loss for curve in found.curves]
    steps = len(found.curves[0].steps)
    print(f"{len(found.curves)} seeds of {steps} steps, loss at the end {min(ends):.4g} to {max(ends):.4g}")
    print(f"baseline: {output}")
    return True


def _run(output: Path, options: Namespace) -> Baseline:
    from glm4ft.testing.baseline.measure import PACKED, PLAN, SEEDS, record_baseline
    from glm4ft.testing.session.gpu_lane import TINY, is_large
    from glm4ft.testing.trial import heavy_bases

    if options.repeat:
        raise ConfigError("an option of recorded runs", where="--repeat", fix="name the recordings with --recordings")
    model = options.model or TINY
    plan = {**(PACKED if options.packing else PLAN), **(heavy_bases.PLAN if is_large(model) else {})}
    plan |= {} if options.steps is None else {"steps": options.steps}
    seeds = SEEDS if options.seeds is None else options.seeds
    return record_baseline(output, options.subject or OWN, model, plan, seeds, _progress)


def _recorded(output: Path, options: Namespace) -> Baseline:
    from glm4ft.testing.baseline.recordings import record_recordings

    for name in ("subject", "seeds", "steps", "packing"):
        if getattr(options, name) is not None:
            raise ConfigError("recorded runs state this themselves", where=f"--{name}", fix=f"leave --{name} out")
    if not options.repeat:
        raise ConfigError("nothing shows that the recorded runs repeat", where="--repeat",
                          fix="record the first run once more and name the folder with --repeat")  # fmt: skip
    folders = [Path(name) for name in options.recordings]
    return record_recordings(output, folders, Path(options.repeat), options.model or "", _progress)


def _compare(options: Namespace) -> bool:
    from glm4ft.files import finite_or_null, write_atomically
    from glm4ft.testing.baseline.compare import compare_again
    from glm4ft.text.safe_text import json_text

    records, is_quiet, recordings = list[dict[str, Any]](), options.json == "-", [Path(n) for n in options.recordings]
    for file in _files(options.files):
        keep = Path(options.keep) / file.name if options.keep else None
        comparison = compare_again(file, keep, _progress, recordings=recordings, base=options.model)
        records.append({"file": str(file), **finite_or_null(comparison.record())})
        if not is_quiet:
            print(f"{file}: {comparison}")
    text = json_text({"schema": 1, "comparisons": records}, indent=1) + "\n"
    if is_quiet:
        sys.stdout.write(text)
    elif options.json:
        write_atomically(Path(options.json), text)
    return not any(record["is_alarm"] for record in records)


def _history(options: Namespace) -> bool:
    from glm4ft.testing.baseline.history import show_history

    show_history(_files(options.files), Path(options.report) if options.report else None)
    return True


def _files(paths: Sequence[str]) -> list[Path]:
    """The files, with each folder replaced by the recordings in it."""
    found = list[Path]()
    for path in map(Path, paths):
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise ConfigError("the folder has no recordings", where=str(path), expected="files that end in .jsonl")
        found += inside
    return found


def _progress(seeds: Sequence[int]) -> Iterator[int]:
    from tqdm import tqdm

    yield from tqdm(seeds, unit="seed", leave=False, disable=None)
