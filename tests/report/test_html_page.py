"""Proves that the page shows the supervised tokens and their losses, in one file that runs nothing, whatever the text.

Run: pytest tests/report/test_html_page.py
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from report_samples import FORMAT, HOSTILE, TOKENIZER, founding_bug, hostile, row_of, with_losses

from glm4ft.report.content import Content, Headline, ShownCheck
from glm4ft.report.costly_tokens import costly_tokens, part_counts, token_parts
from glm4ft.report.heat_map import LEVEL_NAMES, MISSED, NOT_A_TARGET, level_of, stretches
from glm4ft.report.html_page import render_page

VOID = {"meta", "rect", "line", "polyline"}
TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "h1", "h2", "h3", "p", "b",
    "ul", "li", "dl", "dt", "dd", "div", "span", "sup", "code", "pre", "mark", "details", "summary", "figure",
    "figcaption", "table", "thead", "tbody", "tr", "th", "td", "svg", "line", "text", "circle", "polyline", "rect",
}  # fmt: skip


class Page(HTMLParser):
    """Collects the elements and the text of a page; refuses elements that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("th", "td", "li", "dd", "dt", "p", "div", "pre", "summary"):
            self.text += " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def bug() -> Page:
    return Page(render_page(founding_bug()))


def test_the_verdict_comes_first_and_says_what_was_supervised_what_went_wrong_and_what_to_do(bug: Page) -> None:
    body = flat(bug.text.split("training run")[2])  # the first is the title of the document
    order = ["Wrong", "<|assistant|> is a target", "What was supervised", "all 4 <|assistant|> headers",
             "What went wrong", "4 headers hold 98%", "What to do", "Start the supervised span after the header.",
             "Curves"]  # fmt: skip
    places = [body.index(text) for text in order]
    assert places == sorted(places)


def test_the_mask_is_counted_against_what_is_right(bug: Page) -> None:
    assert "<|assistant|> headers 4 4 0 ✗ differs" in flat(bug.text)
    assert "ends of assistant turns 4 0 4 ✗ differs" in flat(bug.text)
    assert "assistant text 111 111 111" in flat(bug.text)


def test_wrong_labels_and_losses_are_written_and_not_only_coloured(bug: Page) -> None:
    text = flat(bug.text)
    assert f"<|assistant|>5.50✗ {NOT_A_TARGET}" in text
    assert f"<|user|>✗ {MISSED}" in text
    assert "<|assistant|> <|assistant|> headers 4 5.5 99 % '+'" in text  # the table of the most costly tokens


def test_curves_show_target_floor_and_every_step(bug: Page) -> None:
    assert "target 0.01" in bug.text
    assert "certified floor 0.18" in bug.text
    assert "step 60: loss, nats per supervised token 0.19039" in bug.text
    labels = [attrs["aria-label"] for tag, attrs in bug.tags if tag == "svg" and "aria-label" in attrs]
    assert labels[0] == "loss, nats per supervised token: 7.47 at step 1, 0.1904 at step 60, between 0.1904 and 7.47"
    assert labels[2] == "learning rate: 0.005 throughout"


def test_a_turn_that_came_back_wrong_is_split_at_its_first_difference(bug: Page) -> None:
    page = render_page(founding_bug())
    assert "塞纳河穿过巴黎。<mark>&lt;|user|&gt;</mark>" in page
    assert "塞纳河穿过巴黎。<mark> cit fu</mark>" in page


def test_options_and_environment_are_shown_with_their_source(bug: Page) -> None:
    assert "schedule constant command line" in flat(bug.text)
    assert "glm4ft train --config bug/config.yaml" in bug.text


@pytest.mark.parametrize("content", [founding_bug(), hostile()], ids=["founding bug", "hostile"])
def test_the_page_runs_nothing_and_loads_nothing(content: Content) -> None:
    """The page has only elements that we write, no handler and no address; the policy allows only our style sheet."""
    page = Page(render_page(content))
    assert {tag for tag, _ in page.tags} <= TAGS
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name in ("style", "href", "src", "srcset")], tag
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", render_page(content), re.S)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not re.search(r"url\(|@import|expression\(", style[1])


def test_no_control_or_bidi_character_reaches_the_page_and_none_is_lost() -> None:
    page = render_page(hostile())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    text = html.unescape(page)
    assert r"\x1b[31mred\x07 \u202egnp.exe" in text
    assert "{{ 7*7 }}" in text


def test_text_cannot_imitate_a_control_token() -> None:
    """A look-alike in the answer is shown as text with its first character escaped, not as a control token."""
    row = with_losses(row_of("a", "see <|assistant|>"))
    pieces = [piece for stretch in stretches(row, TOKENIZER) for piece in stretch.pieces]
    assert [piece.text for piece in pieces if piece.is_control].count("<|assistant|>") == 1
    assert r"\x3c|assistant|>" in "".join(piece.text for piece in pieces)


def test_a_row_of_a_thousand_tokens_is_folded_but_whole() -> None:
    """Costly tokens and boundaries stay visible, long learnt stretches are folded, and no token is missing."""
    long = row_of("why " * 300, "so " * 600)
    shown = with_losses(long)
    dear = replace(shown, losses=[9.0 if at == 700 else loss for at, loss in enumerate(shown.losses)])
    found = stretches(dear, TOKENIZER)
    folded = [stretch.label for stretch in found if stretch.label]
    assert [re.sub(r"[\d,]+", "N", label) for label in folded] == [
        "N ignored tokens (user)", "N supervised tokens (assistant)", "N supervised tokens (assistant)",
    ]  # fmt: skip
    text = "".join(piece.text for stretch in found for piece in stretch.pieces)
    assert text.replace("↵\n", "\n") == TOKENIZER.decode(long.input_ids)
    assert sum(len(stretch.pieces) for stretch in found if not stretch.label) < 140
    assert any(piece.number == "9.00" for stretch in found if not stretch.label for piece in stretch.pieces)


def test_parts_are_those_of_the_format() -> None:
    row = row_of("a", "b", "c", "d")
    ends = {turn.end for turn in row.turns}
    for segment in row.segments:
        for at in range(segment.start, segment.end):
            part = segment.role if segment.part == "body" else segment.part
            part = "assistant header" if part == "header" and segment.role == "assistant" else part
            expected = "terminator" if at in ends else part
            assert token_parts(row.input_ids, TOKENIZER)[at] == expected
    assert part_counts([with_losses(row)], TOKENIZER)["terminator"] == (2, 2, 2)
    assert FORMAT.tokenizer is TOKENIZER


def test_control_token_inside_an_answer_does_not_end_it() -> None:
    """``<think>`` in rows of other trainers is an example: the turn continues to the next header."""
    row = row_of("a", "b")
    (turn,) = row.turns
    ids = [*row.input_ids[: turn.start], FORMAT.tokenizer.convert_tokens_to_ids("[MASK]"), *row.input_ids[turn.start :]]
    assert token_parts(ids, TOKENIZER)[turn.start :] == [*["assistant"] * (turn.end - turn.start + 1), "terminator"]


def test_tokens_that_hold_the_loss_come_first() -> None:
    content = founding_bug()
    (worst,) = costly_tokens(content.rows, TOKENIZER)
    assert (worst.text, worst.count, worst.said) == ("<|assistant|>", 4, "'+'")
    assert worst.loss == pytest.approx(5.5)
    assert worst.share == pytest.approx(22 / (22 + 111 * 0.002))


@pytest.mark.parametrize(("loss", "name"), [(0.01, "learnt"), (0.4, "nearly learnt"), (1.0, "poorly learnt"),
                                             (2.0, "not learnt"), (float("nan"), "not learnt")])  # fmt: skip
def test_a_loss_has_a_level(loss: float, name: str) -> None:
    assert LEVEL_NAMES[level_of(loss)] == name


@pytest.mark.parametrize("change", [{}, {"tokenizer": TOKENIZER, "num_rows": 3}])
def test_an_empty_report_is_still_a_page(change: dict[str, Any]) -> None:
    """A run that broke before its first step has only a verdict."""
    page = Page(render_page(Content("t", Headline("bad", "The run stopped."), **change)))
    assert "The run stopped." in page.text
    assert "Curves" not in page.text


def test_failed_claims_stand_open_and_passed_ones_behind_a_fold() -> None:
    checks = (
        ShownCheck("rows", "headers are ignored", "failed", "position 7\n  and more", "zai-org/GLM-4 342"),
        ShownCheck("rows", "rows are unique", "passed"),
        ShownCheck("update", "steps are AdamW's", "skipped", "no train"),
    )
    text = flat(Page(render_page(Content("t", Headline("bad", "x"), checks=checks))).text)
    assert "rows failed 1 failed, 1 passed failed headers are ignored position 7 and more Seen in the wild" in text
    assert "1 claim passed rows are unique" in text
    assert "update skipped 1 skipped" in text
    assert HOSTILE not in text
