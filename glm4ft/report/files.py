"""Writes a report to disk: the HTML page, and the Markdown summary for the job page of a CI system."""

from __future__ import annotations

from pathlib import Path

from glm4ft.files import write_atomically
from glm4ft.report.content import Content
from glm4ft.report.html_page import render_page
from glm4ft.report.markdown import render_summary

HTML_FILE, SUMMARY_FILE = "report.html", "summary.md"


def write_report(folder: Path, content: Content) -> Path:
    """Write ``report.html`` and ``summary.md`` into a folder, each of them atomically.

    Args:
        folder: The folder, created if missing.
        content: The content of the report.
    Returns:
        The path of ``report.html``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SUMMARY_FILE, render_summary(content))
    write_atomically(folder / HTML_FILE, render_page(content))
    return folder / HTML_FILE
