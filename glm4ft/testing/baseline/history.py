"""The history of a baseline: its files, recorded at several commits, as a table and as a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from glm4ft.errors import DataError
from glm4ft.files import write_atomically
from glm4ft.report.history_page import Recording, render_history
from glm4ft.report.sparkline import sparkline
from glm4ft.testing.baseline.baseline_file import Baseline, read_baseline
from glm4ft.text.safe_text import visible


def show_history(files: Sequence[Path], report: Path | None = None) -> None:
    """Print the history, and write the page if a folder is given.

    Args:
        files: The files, in any order; they are sorted by the time of the recording.
        report: The folder for ``history.html``; None for no page.
    Raises:
        DataError: If a file cannot be read, or the files are not of one subject and base.
    """
    baselines = sorted((read_baseline(file) for file in files), key=lambda baseline: baseline.recorded_at)
    kinds = sorted({f"{b.source}{', packed' * bool(b.identity.plan.get('packing'))}" for b in baselines})
    if len(kinds) > 1:
        raise DataError("the files are not recordings of one baseline", found="; ".join(kinds),
                        fix="give the files of one subject, base and plan")  # fmt: skip
    recordings = [recording_of(baseline) for baseline in baselines]
    places = {device: number for number, device in enumerate(dict.fromkeys(r.device for r in recordings), start=1)}
    table = Table("recorded", "commit", "loss", "norm", "step", "memory", "on", box=box.SIMPLE, padding=(0, 1))
    for r in recordings:
        memory = f"{r.peak_memory_mib:.0f} MiB" if r.peak_memory_mib else "–"
        figures = sparkline(r.curve, width=10), f"{r.grad_norm:.3g}", f"{r.step_s * 1e3:.0f} ms", memory
        table.add_row(r.recorded_at[:10], r.commit[:8] or "–", *figures, str(places[r.device]))
    console = Console(highlight=False, markup=False)
    console.print(visible(kinds[0], newlines=False))
    console.print(table)
    for device, number in places.items():
        console.print(f"on {number}: {visible(device, newlines=False)}", soft_wrap=True)
    if report:
        report.mkdir(parents=True, exist_ok=True)
        write_atomically(report / "history.html", render_history(kinds[0], recordings))
        console.print(f"page: {report / 'history.html'}", soft_wrap=True)


def recording_of(baseline: Baseline) -> Recording:
    """The figures of a recording that the history shows."""
    curves, where = baseline.curves, baseline.environment
    versions = ", ".join(f"{name} {where.get(name, '')}" for name in ("torch", "transformers", "peft"))
    mean = [statistics.fmean(step.loss for step in steps) for steps in zip(*(c.steps for c in curves), strict=True)]
    return Recording(
        recorded_at=baseline.recorded_at,
        commit=baseline.commit,
        device=f"{where.get('device', '')}; {versions}",
        loss=mean[-1],
        grad_norm=statistics.fmean(max(step.grad_norm for step in curve.steps) for curve in curves),
        step_s=statistics.median(curve.step_s for curve in curves),
        peak_memory_mib=max(curve.peak_memory_bytes for curve in curves) / 2**20,
        curve=tuple(mean),
    )
