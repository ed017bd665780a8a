"""What ``glm4ft check`` does: run the conformance suite and show what came of it, stage by stage."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from glm4ft.report.safe_text import Ruled, visible
from glm4ft.testing.runner import Result, all_checks, check_subject, summary
from glm4ft.trajectory import write_atomically

STYLES = {"passed": "green", "failed": "bold red", "error": "bold red", "skipped": "dim", "expected-failure": "yellow"}


def show_checks(spec: str, *, json_file: str | None = None) -> bool:
    """Run all checks on a subject and print the results.

    Args:
        spec: ``MODULE:ATTR`` of the subject.
        json_file: write the results here by contract; ``-`` is stdout, where nothing else goes then.
    Returns:
        True if a check failed or erred.
    """
    began_s, console = time.perf_counter(), Console(highlight=False, quiet=json_file == "-")
    bar = tqdm(check_subject(spec), total=len(all_checks()), unit="check", leave=False, disable=None)
    with contextlib.redirect_stdout(sys.stderr):  # what a trainer prints must not end up in the JSON
        results = list(bar)
    _print(console, spec, results)
    text = json.dumps(summary(spec, results, round(time.perf_counter() - began_s, 3)), ensure_ascii=False, indent=1)
    if json_file == "-":
        sys.stdout.write(text + "\n")
    elif json_file:
        write_atomically(Path(json_file), text + "\n")
    return any(result.status in ("failed", "error") for result in results)


def _print(console: Console, spec: str, results: list[Result]) -> None:
    stage = ""
    for result in results:
        if result.stage != stage:
            stage = result.stage
            console.print(Text(stage, style="bold"))
        claim = result.check.replace("_", " ")
        line = Text.assemble("  ", (f"{result.status:<17}", STYLES[result.status]), f"{claim} ({result.seconds:.1f} s)")
        console.print(line, soft_wrap=True)
        if result.message:
            text = "\n".join(visible(line, newlines=False) for line in result.message.split("\n"))
            console.print(Ruled(Text(text)))
    counts = {status: sum(result.status == status for result in results) for status in STYLES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    console.print(
        Text(f"{visible(spec, newlines=False)}: {told} in {sum(r.seconds for r in results):.1f} s"), soft_wrap=True
    )
