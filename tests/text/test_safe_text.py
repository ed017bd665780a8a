r"""Proves that text from a conversation can be printed: nothing in it acts, hides, or reads as something else.

Run: pytest tests/text/test_safe_text.py
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from glm4ft.text.safe_text import Ruled, escape, harmless, json_text, visible

BIDI = [chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)]
CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))]
RESERVED = ("<|user|>", "[gMASK]", "⟦")
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # man, woman, girl, joined
FORBIDDEN = re.compile("[" + re.escape("".join(c for c in CONTROLS if c != "\n") + "".join(BIDI)) + "\u2028\u2029]")

fragments = st.sampled_from(BIDI + CONTROLS) | st.sampled_from(
    [*RESERVED, "::", ":", "#", "##", "[", "##[group]", "\\", "x1b", "u202e", "U000e0041", "\\x5c",
     "↵", "⇥", "\u200c", "\u200d", "\ufe0f", "\u0301", "\u094d", "\ud800", "\U000e0041", "\u3000", " ", "a", "你", "❤"]
)  # fmt: skip
texts = st.text(st.characters()) | st.lists(fragments | st.characters()).map("".join)


def original(shown: str, *, reserved: tuple[str, ...] = ()) -> str:
    """Undo ``visible``, which gives different results for different texts."""
    firsts = [string[0] for string in reserved]

    def meant(match: re.Match[str]) -> str:
        char = chr(int(match[1][1:], 16))
        is_ours = char in ("\\", ":", "#", *firsts) or visible(char) != char
        return char if is_ours and escape(char) == match[0] else match[0]

    shown = shown.replace("↵\n", "\n").replace("↵", "\n").replace("⇥", "\t")
    return re.sub(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4})", meant, shown)


@given(texts, st.booleans())
@example("\n::error::x", True)
@example("\u3000::error::x", True)
def test_no_text_controls_a_terminal_or_a_runner(text: str, newlines: bool) -> None:
    shown = visible(text, newlines=newlines)
    assert not FORBIDDEN.search(shown)
    assert newlines or "\n" not in shown
    assert not any(line.lstrip().startswith("::") for line in shown.split("\n"))
    assert not re.search(r"##\w*\[", shown)
    shown.encode("utf-8")  # no surrogate is left


@given(texts, st.booleans())
@example(r"\x1b", True)
@example("\\x5cx1b\\\x1b", True)
@example("↵\n⇥\t", False)
def test_nothing_is_lost(text: str, newlines: bool) -> None:
    assert original(visible(text, newlines=newlines, reserved=RESERVED), reserved=RESERVED) == text


@given(texts)
@example("".join(RESERVED))
def test_nothing_reads_as_a_reserved_string(text: str) -> None:
    shown = visible(text, reserved=RESERVED)
    assert not any(string in shown for string in RESERVED)


def test_every_code_point_is_drawn_or_escaped() -> None:
    """Of all characters of Unicode, exactly those that draw nothing after a letter are escaped."""
    drawn_format = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
    selectors = {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
    blank = {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0} | selectors
    wrong = []
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        category = unicodedata.category(char)
        if category in ("Cn", "Co") or char in "\n\t↵⇥":
            continue
        is_invisible = code in blank or (category in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in drawn_format)
        if visible("a" + char) != "a" + (escape(char) if is_invisible else char):
            wrong.append(hex(code))
    assert wrong == []


@pytest.mark.parametrize("char", [*CONTROLS, *BIDI, "\u200b", "\u2060", "\ufeff", "\xad", "\u2028", "\ud800"])
def test_a_control_or_invisible_character_is_shown_by_its_escape(char: str) -> None:
    expected = {"\n": "↵", "\t": "⇥"}.get(char, escape(char))
    assert visible(f"a{char}b", newlines=False) == f"a{expected}b"


@pytest.mark.parametrize(
    "text",
    [
        "你好，世界！　全角", "e\u0301 x\u0323\u0302", FAMILY, "\u2764\ufe0f 1\ufe0f\u20e3 👍🏽", "می\u200cخواهم",
        "क\u094d\u200dष", "葛\U000e0100", "12\xa0km", "\ufffd", "a::b std::vector # ## [x]",
        'C:\\new\\table \\d+ {"city": "\\u4e2d"}',
    ],
)  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pass\u200dword", r"pass\u200dword"),
        ("你\u200c好", r"你\u200c好"),
        ("क\u094d\u200d\u200d", "क\u094d" r"\u200d\u200d"),
        ("a\ufe0f", r"a\ufe0f"),
        ("😀\ufe00\ufe01", "😀\ufe00" r"\ufe01"),
        ("🏴\U000e0067\U000e007f", r"🏴\U000e0067\U000e007f"),
        ("\u0301a", r"\u0301a"),
        ("a\n\u0301", "a↵\n" r"\u0301"),
        ("\x1b\u0301", r"\x1b\u0301"),
    ],
)
def test_what_shapes_nothing_is_shown(text: str, shown: str) -> None:
    """A joiner, a variation selector, a tag or a mark that no drawn character uses can only carry hidden data."""
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("::error::x", r"\x3a:error::x"),
        ("a\n \u3000::add-mask::x", "a↵\n \u3000" r"\x3a:add-mask::x"),
        ("a ##[error]x", r"a \x23#[error]x"),
        ("###vso[task.complete]", r"#\x23#vso[task.complete]"),
        ("\r\n::x", "\\x0d↵\n\\x3a:x"),
    ],
)
def test_a_runner_command_is_broken_up(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_newline_is_shown_with_and_without_a_real_one() -> None:
    assert visible("a\n\nb\tc") == "a↵\n↵\nb⇥c"
    assert visible("a\n\nb\tc", newlines=False) == "a↵↵b⇥c"


def test_a_backslash_is_escaped_only_before_what_reads_as_our_escape() -> None:
    assert visible(r"\x1b \u202e \x5c") == r"\x5cx1b \x5cu202e \x5cx5c"
    assert visible(r"\u4e2d \n \x1B \x41 \\") == r"\u4e2d \n \x1B \x41 \\"


def test_a_reserved_string_loses_its_looks() -> None:
    assert visible("[[gMASK] <|user|><|user", reserved=RESERVED) == r"[\x5bgMASK] \x3c|user|><|user"
    assert visible("abc", reserved=("ab", "bc")) == r"\x61\x62c"


@pytest.mark.parametrize("width", [4, 5, 8, 40])
def test_every_printed_line_has_a_rule_and_no_character_is_lost(width: int) -> None:
    text = "::a  long   word-that-is-long\n\n::error::x 你好 " + "❤\ufe0f" * 9
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(Ruled(Text(text)))
    lines = file.getvalue().split("\n")
    assert all(line.startswith("│ ") and cell_len(line) <= width for line in lines[:-1])
    assert "".join(line[2:] for line in lines) == text.replace("\n", "")


def test_the_rule_is_heavy_where_a_line_begins_between_the_cues() -> None:
    file = io.StringIO()
    text = Text("a <b\nc\nd> <e> f\ng <h\ni")
    Console(file=file, width=40, color_system=None).print(Ruled(text, cues="<>"))
    assert file.getvalue().split("\n") == ["│ a <b", "┃ c", "┃ d> <e> f", "│ g <h", "┃ i", ""]


def test_json_is_safe_to_print_and_means_the_same() -> None:
    value = {"text": "\x1b[31m \x9b \u202e \U000e0041 \ud800 ##[error] 你好 é\u0301 \n", "numbers": [1, 2.5, None]}
    for indent in (None, 1):
        text = json_text(value, indent=indent)
        assert json.loads(text) == value
        assert harmless(text) == text
        assert "你好" in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text(math.inf)
