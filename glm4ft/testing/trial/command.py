"""The command ``glm4ft check``: runs the conformance suite and shows the results, stage by stage."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from glm4ft.errors import ConfigError
from glm4ft.files import write_atomically
from glm4ft.report.files import write_report
from glm4ft.testing.trial.registry import Check
from glm4ft.testing.trial.report import explain_trial, trial_content
from glm4ft.testing.trial.runner import Result, results_record, run_checks, trial_of
from glm4ft.testing.trial.stages import STAGES
from glm4ft.testing.trial.verdicts import group_failures, stage_verdicts
from glm4ft.testing.trial.wiring import unwired
from glm4ft.text.safe_text import Ruled, visible

STYLES = {"passed": "green", "failed": "bold red", "error": "bold red", "skipped": "dim", "expected-failure": "yellow"}
VERDICT_STYLES = {"passed": "green", "failed": "bold red", "not judged": "dim", "expected failure": "yellow"}


def show_checks(
    spec: str,
    checks: Sequence[Check],
    *,
    stages: Sequence[str] = STAGES,
    json_file: str | None = None,
    report: Path | None = None,
) -> bool:
    """Run all checks on a subject and print the results.

    Args:
        spec: The subject as ``MODULE:ATTR``.
        checks: The checks of the suite.
        stages: The stages to judge.
        json_file: The file for the results as JSON; ``-`` is stdout, to which nothing else is written then.
        report: The folder for ``report.html`` and ``summary.md``; None for no report.
    Returns:
        True if a check failed, or the subject raised an error in it.
    Raises:
        ConfigError: If there is no such stage or subject.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        found = ", ".join(unknown) or "none"
        raise ConfigError("there is no such stage", where="--stages", found=found, expected=", ".join(STAGES))
    began_s, console = time.perf_counter(), Console(highlight=False, quiet=json_file == "-")
    total = sum(check.stage in stages for check in checks)
    with trial_of(spec) as trial:
        bar = tqdm(run_checks(trial, checks, stages=stages), total=total, unit="check", leave=False, disable=None)
        with contextlib.redirect_stdout(sys.stderr):  # a trainer's output must not mix with the JSON
            results = list(bar)
            card = explain_trial(spec, results, trial)
            content = trial_content(spec, results, trial, checks) if report else None
        note = unwired(trial.subject)
    _print(console, spec, results)
    if note:
        console.print(Text(visible(note, newlines=False), style="yellow"), soft_wrap=True)
    if card:
        console.print(Text(f"\n{card}\n"), soft_wrap=True)
    if report and content:
        console.print(Text(f"report: {visible(str(write_report(report, content)), newlines=False)}"), soft_wrap=True)
    text = json.dumps(
        results_record(spec, results, round(time.perf_counter() - began_s, 3)), ensure_ascii=False, indent=1
    )
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
    _print_verdicts(console, results)
    _print_causes(console, results)
    counts = {status: sum(result.status == status for result in results) for status in STYLES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    seconds = sum(result.seconds for result in results)
    console.print(Text(f"{visible(spec, newlines=False)}: {told} in {seconds:.1f} s"), soft_wrap=True)


def _print_causes(console: Console, results: list[Result]) -> None:
    """Print each cause once, with the checks that see it."""
    for group in group_failures(results):
        seen_by = ", ".join(name.replace("_", " ") for name in group.checks)
        console.print(Text(f"{group.stage}: {visible(group.text, newlines=False)}", style="bold red"), soft_wrap=True)
        console.print(Ruled(Text(f"seen by {len(group.checks)}: {seen_by}")))


def _print_verdicts(console: Console, results: list[Result]) -> None:
    table = Table("stage", "verdict", "checks", "seconds", box=box.SIMPLE)
    for stage, verdict in stage_verdicts((result.stage, result.status) for result in results).items():
        mine = [result for result in results if result.stage == stage]
        judged = sum(result.status != "skipped" for result in mine)
        seconds = sum(result.seconds for result in mine)
        table.add_row(stage, Text(verdict, style=VERDICT_STYLES[verdict]), f"{judged} of {len(mine)}", f"{seconds:.1f}")
    console.print(table)
