"""Proves that the summary reads well on a job page, and that no text in it acts as Markdown, HTML or a command.

Run: pytest tests/report/test_markdown.py
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from report_samples import HOSTILE, HOSTILE_LINES, founding_bug, hostile

from glm4ft.report.markdown import render_summary
from glm4ft.text.markdown_text import code, prose
from glm4ft.text.safe_text import visible

GITHUB = MarkdownIt("gfm-like", {"linkify": False})
OURS = {"h3", "em", "strong", "ul", "li", "p", "code", "table", "thead", "tbody", "tr", "th", "td"}


def text_of(markdown: str) -> str:
    """Render one inline text as a reader sees it."""
    (paragraph,) = [token for token in GITHUB.parse(markdown) if token.type == "inline"]
    return "".join(child.content for child in paragraph.children or [])


def test_the_summary_of_the_founding_bug() -> None:
    summary = render_summary(founding_bug())
    assert summary.startswith(
        "### ❌ &#60;&#124;assistant&#124;&#62; is a target, and the frozen head cannot express it.\n"
    )
    assert "| &#60;&#124;assistant&#124;&#62; headers | 4 | 4 | 0 ❌ |" in summary
    assert "| ` <\\|assistant\\|> ` | &#60;&#124;assistant&#124;&#62; headers | 4 | 5.5 | 99% | – |" in summary
    assert "- certified floor: 0.18\n" in summary
    assert "Round trip: 1 of 2 assistant turns came back exactly." in summary
    assert len(summary.splitlines()) < 60


def test_hostile_text_is_only_text() -> None:
    """The rendered summary holds only the elements that we wrote, and no links."""
    summary = render_summary(hostile())
    rendered = GITHUB.render(summary)
    assert {tag.lower() for tag in re.findall(r"<(\w+)", rendered)} <= OURS
    assert "href" not in rendered
    assert len(re.findall(r"<h3>", rendered)) == 1


def test_no_line_of_a_summary_commands_a_runner() -> None:
    summary = render_summary(hostile())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", summary)
    assert not any(line.lstrip().startswith("::") for line in summary.split("\n"))
    assert "##[" not in summary


@given(st.text(st.sampled_from(HOSTILE + "-+1.)\t \n你")) | st.text())
def test_prose_reads_the_same_and_acts_as_nothing(text: str) -> None:
    shown = visible(text, newlines=False).strip()
    if shown:
        assert text_of(f"- **x** {prose(text)}").removeprefix("x").split() == shown.split()


@pytest.mark.parametrize("text", [HOSTILE, HOSTILE_LINES, "`", "``a`", " a "])
def test_code_reads_the_same(text: str) -> None:
    assert text_of(code(text)).strip() == visible(text, newlines=False).strip()
    cell = GITHUB.render(f"| a | b |\n|---|---|\n| {code(text, in_table=True)} | c |\n")
    assert cell.count("<td") == 2
