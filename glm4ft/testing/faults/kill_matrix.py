"""The command ``glm4ft faults``: runs faults and variations against the suite and shows the matrix and the score."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from tqdm import tqdm

from glm4ft.errors import ConfigError
from glm4ft.files import write_atomically
from glm4ft.testing.faults.calibration import show_calibration
from glm4ft.testing.faults.pages import matrix_page
from glm4ft.testing.faults.practices import try_practices
from glm4ft.testing.faults.registry import all_faults
from glm4ft.testing.faults.results import Caught, Matrix, Silence
from glm4ft.testing.faults.runner import require_known_ids, run_one
from glm4ft.testing.faults.variations import all_variations
from glm4ft.testing.faults.warm import in_parallel
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.text.safe_text import json_text, visible

LOG_WIDTH = 150
COLUMNS = ("stage", "first check that caught it", "verdict", "cause", "seconds")


def try_all(ids: Sequence[str] = (), *, practices: bool = False, num_workers: int | None = None) -> Matrix:
    """Run faults and variations in parallel, with a progress bar.

    Args:
        ids: The ids of faults and variations to run; by default all.
        practices: Whether to also measure which faults the common practices notice.
        num_workers: The number of processes; by default one per core.
    Raises:
        ConfigError: If an id is unknown.
    """
    require_known_ids(ids)
    began_s, chosen = time.perf_counter(), list(ids) or [*all_faults(), *all_variations()]
    results = {r.id: r for r in _with_bar(in_parallel(run_one, chosen, num_workers), len(chosen), "fault")}
    faults = [id for id in all_faults() if id in chosen]
    # on the bases with experts the healthy loop itself needs more steps than the practices take
    dense = [id for id in faults if all_faults()[id].subject.architecture == Subject.architecture] if practices else []
    noticed = {n.id: n for n in _with_bar(in_parallel(try_practices, dense, num_workers), len(dense), "practice")}
    return Matrix(
        tuple(r for id in faults if isinstance(r := results[id], Caught)),
        tuple(r for id in all_variations() if isinstance(r := results.get(id), Silence)),
        noticed,
        time.perf_counter() - began_s,
    )


def _with_bar(results: Any, total: int, unit: str) -> Any:
    return tqdm(results, total=total, unit=unit, leave=False, disable=None if total else True)


def show_faults(
    ids: Sequence[str] = (),
    *,
    json_file: str | None = None,
    markdown: str | None = None,
    calibrate: str | None = None,
    num_seeds: int = 20,
    practices: bool = False,
    num_workers: int | None = None,
) -> bool:
    """Run faults and variations and print the matrix.

    Args:
        ids: The ids of faults and variations to run; by default all.
        json_file: The file for the results as JSON; ``-`` writes them to stdout and nothing else.
        markdown: The file for the page of the documentation.
        calibrate: The file for the page of the thresholds, which are measured on the variations, too.
        num_seeds: The number of seeds of each variation for the thresholds.
        practices: Whether to also measure which faults the common practices notice.
        num_workers: The number of processes; by default one per core.
    Returns:
        True if a fault was not caught at its stage, a variation raised an alarm, or a threshold has too little room.
    Raises:
        ConfigError: If an id is unknown, or thresholds are to be measured without a variation.
    """
    if calibrate and ids and not all_variations().keys() & set(ids):
        raise ConfigError("thresholds lie between faults and healthy pipelines", where="--calibrate",
                          found=", ".join(ids), fix="name variations, too, or no ids at all")  # fmt: skip
    matrix = try_all(ids, practices=practices, num_workers=num_workers)
    # a log file has no width, and 80 columns would cut off the ids
    width = None if sys.stdout.isatty() else LOG_WIDTH
    _print(Console(highlight=False, quiet=json_file == "-", width=width), matrix)
    text = json_text(matrix_record(matrix), indent=1) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
    elif json_file:
        write_atomically(Path(json_file), text)
    if markdown:
        write_atomically(Path(markdown), matrix_page(matrix))
    is_narrow = bool(calibrate) and show_calibration(
        matrix, str(calibrate), num_seeds=num_seeds, num_workers=num_workers
    )
    return bool(matrix.failures) or is_narrow


def matrix_record(matrix: Matrix) -> dict[str, Any]:
    """The results in the form that ``glm4ft faults --json`` writes."""
    faults = [
        {
            "id": caught.id,
            "expected_stage": caught.expected_stage,
            "caught_by": list(caught.caught_by),
            "diagnosed_stage": caught.diagnosed_stage,
            "cause": caught.message if caught.names_cause else "",
            "seconds": round(caught.seconds, 3),
            **({"noticed_by": list(matrix.noticed[caught.id].by)} if caught.id in matrix.noticed else {}),
        }
        for caught in matrix.faults
    ]
    benign = [{"id": silence.id, "alarms": list(silence.alarms)} for silence in matrix.benign]
    return {"schema": 1, "faults": faults, "benign": benign, "seconds": round(matrix.seconds, 3)}


def _print(console: Console, matrix: Matrix) -> None:
    if matrix.faults:
        table = Table(Column("fault", no_wrap=True), *COLUMNS, box=box.SIMPLE)
        for caught in matrix.faults:
            style = "green" if caught.is_right else "bold red"
            verdict = Text(caught.diagnosed_stage or "not caught", style=style)
            cause = "named" if caught.names_cause else ""
            check = ", ".join(caught.caught_by).replace("_", " ")
            table.add_row(caught.id, caught.expected_stage, check, verdict, cause, f"{caught.seconds:.1f}")
        console.print(table)
    for caught in matrix.faults:
        if not caught.is_right:
            said = [caught.message] if caught.message else list(caught.errors) or ["no check failed"]
            console.print(Text(f"{caught.id}: {visible(' | '.join(said), newlines=False)}"), soft_wrap=True)
    for silence in matrix.benign:
        state = (f"{len(silence.alarms)} alarms", "bold red") if silence.alarms else ("silent", "green")
        console.print(Text.assemble(f"  {silence.id:<44}", state, f" ({silence.seconds:.1f} s)"))
        for alarm in silence.alarms:
            console.print(Text("    " + visible(alarm, newlines=False)), soft_wrap=True)
    for line in matrix.score():
        console.print(Text(line))
    console.print(Text(f"{matrix.seconds:.0f} s"))
