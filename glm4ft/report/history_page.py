"""Renders the history of a baseline as one HTML file: a figure per chart, a point per recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glm4ft.report.chart import Chart
from glm4ft.report.html_page import environment, style_and_digest


@dataclass(frozen=True)
class Recording:
    """One recording of a baseline.

    Args:
        recorded_at: The time of the recording.
        commit: The commit that was measured; "" if not known.
        device: The device and the versions that it was measured with.
        loss: The mean loss of the last step over the seeds, in nats per supervised token.
        grad_norm: The largest gradient norm, in the mean over the seeds.
        step_s: The median duration of a step, in seconds.
        peak_memory_mib: The largest memory, in MiB; 0 if it was not measured.
        curve: The mean loss of each step over the seeds.
    """

    recorded_at: str
    commit: str
    device: str
    loss: float
    grad_norm: float
    step_s: float
    peak_memory_mib: float
    curve: tuple[float, ...]


FIGURES = (
    ("loss", "loss of the last step, nats per supervised token"),
    ("grad_norm", "largest gradient norm before clipping"),
    ("step_s", "seconds per optimizer step, recorder included"),
    ("peak_memory_mib", "largest memory, MiB"),
)


def render_history(title: str, recordings: Sequence[Recording]) -> str:
    """Render the history as HTML.

    Args:
        title: The name of the baseline.
        recordings: The recordings, oldest first.
    Returns:
        A complete document with the style sheet and the security policy of the report.
    """
    numbers = list(range(1, len(recordings) + 1))
    charts = [
        Chart(words, numbers, [getattr(r, name) for r in recordings], x_name="recording")
        for name, words in FIGURES
        if any(getattr(r, name) for r in recordings)
    ]
    style, digest = style_and_digest()
    page = environment().get_template("history.html")
    return page.render(title=title, recordings=recordings, charts=charts, style=style, style_sha256=digest)
