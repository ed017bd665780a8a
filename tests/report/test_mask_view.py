"""Proves that the mask viewer shows exactly what is supervised, at any width, without colour, whatever the text holds.

Run: pytest tests/report/test_mask_view.py
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

import glm4ft
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.data.reader import read_conversations
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.report.mask_totals import Totals, render_totals
from glm4ft.report.mask_view import mask_record, mask_text, render_legend, render_row
from glm4ft.text.safe_text import escape, visible

DEMO = Path(glm4ft.__file__).parent / "demo" / "two_conversations.jsonl"
TOKENIZER = tiny_tokenizer()
FORMAT = ChatFormat("glm-4-0414", TOKENIZER)
ROWS = [FORMAT.encode(conversation) for conversation in read_conversations(DEMO)]
HOSTILE = (
    "\x1b[31mred\x07 \u202egnp.exe [bold]x[/bold] :smile: ⟦supervised⟧ ⟨… 9 ignored tokens (user) …⟩ <|assistant|>\n"
    "::error::x\n ##[group]x \\x1b\r\n\t东京\u200b塔 👨\u200d👩\u200d👧 e\u0301"
)

hostile_pieces = st.sampled_from(
    [*HOSTILE.split(" "), " ", "  ", "\n", "::", "##", "[group]", "<|user|>", "中", "❤\ufe0f"]
)
contents = st.lists(hostile_pieces | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1).map(
    "".join
)
rows = st.lists(st.tuples(contents, contents), min_size=1, max_size=3).map(lambda pairs: row_of(*sum(pairs, ())))
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def row_of(*texts: str, line: int = 0) -> EncodedRow:
    """Encode a conversation of alternating user and assistant messages."""
    messages = [Message("assistant" if i % 2 else "user", text or "a") for i, text in enumerate(texts)]
    return FORMAT.encode(Conversation(tuple(messages), line=line))


def with_supervised(row: EncodedRow, *positions: int) -> EncodedRow:
    return dataclasses.replace(row, supervised=[i in positions for i in range(len(row.input_ids))])


def printed(renderable: RenderableType, width: int = 100, **options: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **{"color_system": None, **options}).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def text_of(row: EncodedRow, width: int) -> str:
    """Print a row with ``render_row``, and undo the rules and the breaks between terminal lines."""
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(render_row(row, FORMAT))
    lines = [line for line in file.getvalue().split("\n") if line.startswith(("│ ", "┃ "))]
    return re.sub("(?<!↵)\n", "", "\n".join(line[2:] for line in lines))


def original(shown: str) -> str:
    """Undo ``visible``, which its own tests prove to be invertible."""
    reserved = [*"⟦⟧⟨<[", "\\", ":", "#"]  # first characters of what the viewer reserves, and of runner commands

    def meant(match: re.Match[str]) -> str:
        char = chr(int(match[1][1:], 16))
        return char if (char in reserved or visible(char) != char) and escape(char) == match[0] else match[0]

    shown = shown.replace("↵\n", "\n").replace("↵", "\n").replace("⇥", "\t")
    return re.sub(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4})", meant, shown)


def supervised_text(row: EncodedRow) -> str:
    return str(TOKENIZER.decode([i for i, keep in zip(row.input_ids, row.supervised, strict=True) if keep]))


def test_two_turns_are_shown_with_their_cues() -> None:
    assert printed(render_row(ROWS[0], FORMAT)) == (
        "line 1: 88 tokens, 53 supervised (60%), 2 of 2 assistant turns trained\n"
        "│ [gMASK]<sop><|user|>↵\n"
        "│ 你好！法国的首都是哪里？<|assistant|>⟦↵\n"
        "┃ 法国的首都是巴黎。<|user|>⟧↵\n"
        "│ Thanks! Which river runs through it?<|assistant|>⟦↵\n"
        "┃ The Seine runs through Paris. 塞纳河穿过巴黎。<|user|>⟧"
    )


def test_a_tool_call_is_shown_and_a_long_ignored_run_is_folded() -> None:
    assert printed(render_row(ROWS[1], FORMAT)) == (
        "line 2: 499 tokens, 62 supervised (12%), 2 of 2 assistant turns trained\n"
        "│ [gMASK]<sop><|system|>↵\n"
        "│ # Tools↵\n"
        "│ ## ⟨… 336 ignored tokens (system) …⟩given as JSON.<|system|>↵\n"
        "│ You are a weather assistant. Answer in one sentence.<|user|>↵\n"
        "│ What is the weather like in Beijing today?<|assistant|>⟦get_weather↵\n"
        '┃ {"city": "Beijing", "unit": "celsius"}<|observation|>⟧↵\n'
        '│ {"temperature": 22, "sky": "clear"}<|assistant|>⟦↵\n'
        "┃ It is 22 degrees and clear in Beijing today.<|user|>⟧"
    )


def test_boundaries_are_shown_token_by_token() -> None:
    """Three tokens are shown on each side of each boundary; a partial character as its bytes and the character."""
    table = printed(render_row(ROWS[0], FORMAT, boundaries=True)).split("\n")[6:24]
    assert "\n".join(table) == (
        "turn 1 (message 1): starts at 21, terminator at 35\n"
        "┌──────────┬─────┬─────────────────────┬───────────┬────────────┬────────────┐\n"
        "│ position │ id  │ token               │ role      │ part       │ loss       │\n"
        "├──────────┼─────┼─────────────────────┼───────────┼────────────┼────────────┤\n"
        "│ 18       │ 234 │ '\\x8c' (3 of 3: 里) │ user      │ body       │ ignored    │\n"
        "│ 19       │ 446 │ '？'                │ user      │ body       │ ignored    │\n"
        "│ 20       │ 484 │ <|assistant|>       │ assistant │ header     │ ignored    │\n"
        "│ 21       │ 198 │ '↵'                 │ assistant │ body       │ supervised │\n"
        "│ 22       │ 469 │ '法'                │ assistant │ body       │ supervised │\n"
        "│ 23       │ 467 │ '国'                │ assistant │ body       │ supervised │\n"
        "│ …        │     │ 9 more tokens       │           │            │            │\n"
        "│ 33       │ 236 │ '\\x8e' (3 of 3: 黎) │ assistant │ body       │ supervised │\n"
        "│ 34       │ 442 │ '。'                │ assistant │ body       │ supervised │\n"
        "│ 35       │ 483 │ <|user|>            │ user      │ terminator │ supervised │\n"
        "│ 36       │ 198 │ '↵'                 │ user      │ body       │ ignored    │\n"
        "│ 37       │ 432 │ 'Thanks'            │ user      │ body       │ ignored    │\n"
        "│ 38       │ 0   │ '!'                 │ user      │ body       │ ignored    │\n"
        "└──────────┴─────┴─────────────────────┴───────────┴────────────┴────────────┘"
    )


def test_boundaries_that_overlap_are_shown_once() -> None:
    row = row_of("a", "b")
    positions = re.findall(r"^│ (\d+) ", printed(render_row(row, FORMAT, boundaries=True)), re.M)
    assert positions == ["3", "4", "5", "6", "7", "8"]


@quick
@given(rows, st.integers(8, 120))
@example(row_of(HOSTILE, HOSTILE), 20)
@example(row_of("a", "two  spaces  at  each  break   of a line  "), 13)
@example(row_of("a", "❤\ufe0f" * 30), 9)
def test_the_text_between_the_cues_is_what_is_supervised(row: EncodedRow, width: int) -> None:
    """The text read back from the printed lines is exact at any width, spaces included."""
    between = re.findall("⟦([^⟦⟧]*)⟧", text_of(row, width))
    assert original("".join(between)) == supervised_text(row)
    assert len(between) == len(row.turns)


@quick
@given(rows, st.data())
def test_any_mask_is_shown_as_it_is(row: EncodedRow, data: st.DataObject) -> None:
    """The cues follow ``supervised`` and not the segments, so that a wrong mask does not look right."""
    chosen = data.draw(st.lists(st.sampled_from(row.segments), unique=True))
    row = with_supervised(row, *(i for segment in chosen for i in range(segment.start, segment.end)))
    shown = mask_text(row, FORMAT).plain
    assert original("".join(re.findall("⟦([^⟦⟧]*)⟧", shown))) == supervised_text(row)


@quick
@given(rows)
def test_an_unfolded_row_is_shown_whole(row: EncodedRow) -> None:
    shown = mask_text(row, FORMAT, context_tokens=len(row.input_ids)).plain
    assert original(re.sub("[⟦⟧]", "", shown)) == TOKENIZER.decode(row.input_ids)


@quick
@given(rows, st.integers(24, 120))
@example(row_of(HOSTILE, HOSTILE), 24)
@example(row_of("a", "x" * 22 + "::error::x"), 24)
def test_no_conversation_controls_a_terminal_or_a_runner(row: EncodedRow, width: int) -> None:
    """Wherever lines break, every line but our own summaries and titles starts with a rule or a border."""
    totals = Totals()
    totals.add(None, line=1, dropped=HOSTILE, warnings=[HOSTILE, "::error::" * 9])
    shown = printed(render_row(row, FORMAT, boundaries=True), width) + printed(render_totals(totals), width)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]", shown)
    assert not re.search(r"##\w*\[", shown)
    assert not re.search(r"^\s*::", shown, re.M)


def test_a_cue_a_fold_and_a_control_token_cannot_be_forged() -> None:
    shown = mask_text(row_of(HOSTILE, "b"), FORMAT, context_tokens=999).plain
    assert (shown.count("⟦"), shown.count("⟨…"), shown.count("<|assistant|>")) == (1, 0, 1)
    assert r"\u27e6supervised\u27e7" in shown
    assert r"\x3c|assistant|>" in shown


def test_data_is_never_parsed_as_markup() -> None:
    assert "[bold]x[/bold] :smile:" in mask_text(row_of("a", HOSTILE), FORMAT).plain
    totals = Totals()
    totals.add(None, line=1, dropped="[bold]x[/bold] :smile:")
    assert "[bold]x[/bold] :smile:" in printed(render_totals(totals))


def test_a_character_cut_by_the_mask_is_shown_by_its_bytes() -> None:
    """The character 塞 is three tokens; U+FFFD never appears, and no token is left out."""
    row = row_of("塞", "b")
    shown = mask_text(with_supervised(row, 5), FORMAT).plain
    assert "<|user|>↵\n" r"\xe5⟦\xa1⟧\x9e<|assistant|>" in shown


def test_an_id_beyond_the_vocabulary_is_shown_by_its_number() -> None:
    row = row_of("a", "b")
    row.input_ids[4] = 9999
    assert "<|user|>↵\n<id 9999><|assistant|>" in mask_text(row, FORMAT).plain


def test_a_fold_leaves_whole_characters_at_both_ends() -> None:
    """The text has 43 tokens; the 12 at its ends hold a newline and three characters, and four characters."""
    shown = mask_text(row_of("塞" * 14, "b"), FORMAT).plain
    assert "<|user|>↵\n塞塞塞⟨… 21 ignored tokens (user) …⟩塞塞塞塞<|assistant|>" in shown


def test_a_supervised_run_is_never_folded() -> None:
    assert "塞" * 99 in mask_text(row_of("a", "塞" * 99), FORMAT).plain


def test_a_row_without_a_supervised_token_says_so_in_its_summary() -> None:
    row = with_supervised(row_of("a", "b", line=3))
    shown = printed(render_row(row, FORMAT))
    assert shown.startswith("line 3: 9 tokens, 0 supervised (0%)")
    assert "⟦" not in shown
    coloured = printed(render_row(row, FORMAT), force_terminal=True, color_system="standard")
    assert "\x1b[1;31m0 supervised (0%)" in coloured


def test_colour_is_a_second_cue_for_supervised_text() -> None:
    coloured = printed(render_row(ROWS[0], FORMAT), force_terminal=True, color_system="standard")
    green, dim = "\x1b[1;32m", "\x1b[2m"
    assert f"{green}法国的首都是巴黎。\x1b[0m" in coloured
    assert f"{dim}你好！法国的首都是哪里？\x1b[0m" in coloured
    assert f"{green}你好" not in coloured


def test_piped_output_has_no_escape_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    totals = Totals()
    totals.add(ROWS[0], line=1)
    for renderable in (render_legend(), render_row(ROWS[0], FORMAT, boundaries=True), render_totals(totals)):
        assert "\x1b" not in printed(renderable, color_system="auto")


def test_no_color_drops_the_colours_and_keeps_the_cues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = printed(render_row(ROWS[0], FORMAT), force_terminal=True, color_system="standard")
    assert not re.search(r"\x1b\[[\d;]*3\d", shown)
    assert "⟦" in shown


def test_the_legend_explains_every_cue_in_one_line() -> None:
    assert printed(render_legend(), 80) == (
        r"⟦supervised⟧ ignored <|control token|> ↵ newline ⇥ tab ⟨… folded …⟩ \x1b escape"
    )


def test_a_record_keeps_the_contract() -> None:
    """The labels are unshifted, and -100 where a token is not supervised."""
    record = json.loads(json.dumps(mask_record(0, ROWS[0], line=1, dropped=None)))
    labels = [i if keep else -100 for i, keep in zip(ROWS[0].input_ids, ROWS[0].supervised, strict=True)]
    assert record == {"schema": 1, "index": 0, "line": 1, "input_ids": ROWS[0].input_ids, "labels": labels}
    assert mask_record(4, None, line=9, dropped="why") == {"schema": 1, "index": 4, "line": 9, "dropped": "why"}


@pytest.mark.parametrize(("row", "dropped"), [(None, None), (ROWS[0], "why")])
def test_a_conversation_is_either_a_row_or_dropped(row: EncodedRow | None, dropped: str | None) -> None:
    with pytest.raises(ValueError, match="exactly one of row and dropped"):
        mask_record(0, row, line=1, dropped=dropped)
    with pytest.raises(ValueError, match="exactly one of row and dropped"):
        Totals().add(row, line=1, dropped=dropped)


def test_totals_count_tokens_by_label_and_name_the_lines() -> None:
    totals = Totals()
    for row in ROWS:
        totals.add(row, line=row.line, warnings=["messages[3] calls 'f'", "messages[5] calls 'f'"])
    for line in range(3, 12):
        totals.add(None, line=line, dropped="no supervised token")
    assert printed(render_totals(totals)) == (
        "11 conversations, 2 rows\n"
        "┌─────────────┬─────┬────────────┬───────┐\n"
        "│ tokens of   │ all │ supervised │ share │\n"
        "├─────────────┼─────┼────────────┼───────┤\n"
        "│ prefix      │   4 │          0 │    0% │\n"
        "│ header      │   8 │          0 │    0% │\n"
        "│ system      │ 384 │          0 │    0% │\n"
        "│ user        │  45 │          0 │    0% │\n"
        "│ observation │  31 │          0 │    0% │\n"
        "│ assistant   │ 111 │        111 │  100% │\n"
        "│ terminator  │   4 │          4 │  100% │\n"
        "├─────────────┼─────┼────────────┼───────┤\n"
        "│ total       │ 587 │        115 │   19% │\n"
        "└─────────────┴─────┴────────────┴───────┘\n"
        "┌────────────────────────────────┬───────┬──────────────────┐\n"
        "│ what                           │ count │ first lines      │\n"
        "├────────────────────────────────┼───────┼──────────────────┤\n"
        "│ dropped: no supervised token   │ 9     │ 3, 4, 5, 6, 7, … │\n"
        "│ warning: messages[*] calls 'f' │ 4     │ 1, 2             │\n"
        "└────────────────────────────────┴───────┴──────────────────┘"
    )


def test_totals_give_the_founding_bug_away() -> None:
    """The mask of zai-org/GLM-4 342 has headers supervised and terminators not."""
    row = ROWS[0]
    shifted = [*row.supervised[1:], False]
    totals = Totals()
    totals.add(dataclasses.replace(row, supervised=shifted), line=1)
    shown = printed(render_totals(totals))
    assert re.search(r"header +│ +3 │ 2 \(should be 0\) │ +66%", shown)
    assert re.search(r"terminator +│ +2 │ +0 │ +0%", shown)


@quick
@given(st.lists(rows, max_size=4))
def test_totals_add_up(some: list[EncodedRow]) -> None:
    totals = Totals()
    for row in some:
        totals.add(row, line=row.line)
    assert totals.tokens.total() == sum(len(row.input_ids) for row in some)
    assert totals.supervised.total() == sum(sum(row.supervised) for row in some)
    printed(render_totals(totals))


def test_totals_stay_small_however_many_kinds_of_warning_there_are() -> None:
    totals = Totals()
    for line in range(1, 100):
        totals.add(None, line=line, dropped="why", warnings=[f"calls {line}"])
    assert len(totals.warnings) == 21
    assert (totals.warnings["other warnings"].count, totals.dropped["why"].first) == (79, [1, 2, 3, 4, 5])


def test_a_share_is_rounded_to_none_or_all_only_when_it_is() -> None:
    row = row_of("a" * 300, "b" * 299)
    totals = Totals()
    totals.add(with_supervised(row, 3, *range(306, 605)), line=1)
    shown = printed(render_totals(totals))
    assert re.search(r"user .* <1% ", shown)
    assert re.search(r"assistant .* 99% ", shown)
