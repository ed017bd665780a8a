r"""Makes text from conversations harmless in terminals and CI logs, and shows what would be invisible.

Conversation text is data from anywhere. Printed raw it can move the cursor, recolour or retitle a terminal (ESC and
other controls), show its characters in another order than they are trained in (bidi controls), hide characters that
are trained (zero-width and other format characters), or command a CI runner from its log.

A hidden character becomes an escape with Python's spelling, ``\x1b`` or ``\u202e``, so nothing is lost. A backslash is
escaped only where it would otherwise read as such an escape; Windows paths, regular expressions and the ``\u4e2d`` of
JSON strings are unchanged.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.cells import get_character_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

NEWLINE, TAB = "↵", "⇥"

# GitHub reads a line that starts with "::" as a command, after trimming white space, and "##[" anywhere in a line
# (actions/runner, src/Runner.Common/ActionCommand.cs); Azure Pipelines and TeamCity read "##vso[" and "##teamcity[".
_COMMANDS = re.compile(r"(?:\A|\n)[^\S\n]*(:)(?=:)|(#)(?=#\w*\[)")
_OWN_GLYPHS = re.compile(f"([{NEWLINE}{TAB}])")
_ESCAPES = re.compile(r"(\\)(?=(x[0-9a-f]{2}|u[0-9a-f]{4}|U000[1-9a-f][0-9a-f]{4}|U0010[0-9a-f]{4}))")

# Category Cf, but drawn: Arabic and Kaithi number signs and the like, which precede the digits they span.
_DRAWN_FORMAT = frozenset(map(chr, (*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD)))
# Drawn as nothing although their category is letter, mark, symbol or unassigned (Default_Ignorable_Code_Point in the
# Unicode Character Database, and the empty Braille pattern).
_BLANK = frozenset(map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2065, 0x2800, 0x3164, 0xFFA0)))
_BLANK_RANGES = ((0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF))
_SELECTOR_RANGES = ((0x180B, 0x180D), (0x180F, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
_JOINERS = ("\u200c", "\u200d")
_VIRAMA = 9  # canonical combining class of the signs that join Indic consonants


def visible(text: str, *, newlines: bool = True, reserved: Sequence[str] = ()) -> str:
    r"""Make a text safe to print. Equal texts give equal results, and different texts give different results.

    * Controls (also CR), bidi controls, lone surrogates, line and paragraph separators and invisible format
      characters become escapes; a newline becomes ``↵`` and a tab ``⇥``.
    * Zero-width joiners and variation selectors stay where they are part of the spelling (emoji sequences, Persian,
      Indic scripts). Anywhere else they only hide data and become escapes.
    * A combining mark without a base character becomes an escape: it would change the character printed before it.
    * Commands to CI runners are broken up: ``\x3a:error`` at the start of a line, ``\x23#[group]`` anywhere.

    Args:
        text: Any text.
        newlines: Whether each ``↵`` is followed by a real newline; if False the result is one line.
        reserved: Strings that have a meaning where the text is shown; their first character is escaped in the text.

    Returns:
        Printable text.
    """
    return "".join(visible_characters(text, newlines=newlines, reserved=reserved))


def visible_characters(text: str, *, newlines: bool = True, reserved: Sequence[str] = ()) -> list[str]:
    """Make a text safe to print, character by character, for text that is shown in parts.

    Args:
        text: Any text.
        newlines: Whether each ``↵`` is followed by a real newline, as for ``visible``.
        reserved: Strings that have a meaning where the text is shown, as for ``visible``.

    Returns:
        One printable string per character; joined they are the result of ``visible``.
    """
    reserved = tuple(reserved)
    forced = set(_forced(text, reserved))
    shown, previous = [], ""  # previous: the character drawn before, to which a mark attaches; "" if there is none
    for at, char in enumerate(text):
        if char == "\n":
            shown.append(NEWLINE + "\n" if newlines else NEWLINE)
        elif char == "\t":
            shown.append(TAB)
        elif at in forced or _is_hidden(char, previous, text[at + 1 : at + 2]):
            shown.append(escape(char))
        else:
            shown.append(char)
            previous = char
            continue
        previous = ""
    return shown


def escape(char: str) -> str:
    r"""Return the shortest escape of one character: ``\x1b``, ``\u202e`` or ``\U000e0041``."""
    code = ord(char)
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def harmless(text: str) -> str:
    r"""Make our own text safe to print where names and values from files are quoted in it.

    Hidden characters become escapes and commands to CI runners are broken up, as in ``visible``; newlines stay, and
    so does all else. What is harmless already is unchanged, so a text may pass through here twice.

    Args:
        text: Any text.

    Returns:
        Printable lines.
    """
    return _escaped(text, escape)


def json_text(value: Any, *, indent: int | None = None) -> str:
    r"""Write a value as JSON that is safe to print, too, and means the same to every reader of JSON.

    Letters of all scripts stay; what ``visible`` would escape is written as ``\uXXXX``.

    Args:
        value: The value; numbers are finite.
        indent: The indentation of nested values, as for ``json.dumps``; None for one line.
    """
    return _escaped(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent), _json_escape)


def _json_escape(char: str) -> str:
    code = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{code[i : i + 4]}" for i in range(0, len(code), 4))


def _escaped(text: str, escaped: Callable[[str], str]) -> str:
    """A text with its hidden characters, and the first character of commands to CI runners, replaced; newlines stay."""
    commands = {match.start(match.lastindex or 0) for match in _COMMANDS.finditer(text)}
    shown, previous = list[str](), ""
    for at, char in enumerate(text):
        is_harmless = char == "\n" or not (at in commands or _is_hidden(char, previous, text[at + 1 : at + 2]))
        shown.append(char if is_harmless else escaped(char))
        previous = char if is_harmless and char != "\n" else ""
    return "".join(shown)


class Ruled:
    """Text with a vertical rule at the left of every printed line, so that no line starts with text from the data.

    Lines are broken here and not by rich, which drops spaces at a break and would leave a broken line without a rule.

    Args:
        text: The text, whose strings have passed through ``visible``.
        cues: An opening and a closing character, or ""; the rule is heavy on lines that begin between the two.
        style: The style of the heavy rule.
    """

    def __init__(self, text: Text, *, cues: str = "", style: str = "") -> None:
        self.text, self.cues, self.style = text, cues, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, is_open = max(options.max_width - 2, 2), False
        for whole in self.text.split("\n"):
            for line in whole.divide(_breaks(whole.plain, width)):
                rule = ("┃ ", self.style) if is_open else ("│ ", "dim")
                yield Text.assemble(rule, line, no_wrap=True, overflow="ignore")
                for cue in filter(self.cues.__contains__, line.plain):
                    is_open = cue == self.cues[0]


def _breaks(line: str, width: int) -> list[int]:
    """Return the offsets at which to break a line so that each piece fits, after a space where there is one."""
    # an emoji selector widens the character before it in some versions of rich
    cells = [get_character_cell_size(char) + (line[at + 1 : at + 2] == "\ufe0f") for at, char in enumerate(line)]
    breaks, start, after_space, used = [], 0, 0, 0
    for at, char in enumerate(line):
        while used + cells[at] > width and at > start:
            start = after_space if after_space > start else at
            used = sum(cells[start:at])
            breaks.append(start)
        used += cells[at]
        if char == " ":
            after_space = at + 1
    return breaks


def _forced(text: str, reserved: tuple[str, ...]) -> Iterator[int]:
    """Yield the positions of printable characters to escape: runner commands, cues, and look-alikes of escapes."""
    for pattern in (_COMMANDS, _OWN_GLYPHS):
        for match in pattern.finditer(text):
            yield match.start(match.lastindex or 0)
    if reserved:
        for match in _lookahead(reserved).finditer(text):
            yield match.start()
    first_chars = {string[0] for string in reserved}
    for match in _ESCAPES.finditer(text):
        meant = chr(int(match[2][1:], 16))
        if escape(meant) == "\\" + match[2] and (meant in first_chars or _can_be_escaped(meant)):
            yield match.start()


@functools.lru_cache(maxsize=64)
def _lookahead(reserved: tuple[str, ...]) -> re.Pattern[str]:
    # lookahead consumes nothing, so overlaps such as "[[gMASK]" are found too
    return re.compile("|".join(f"(?={re.escape(string)})" for string in reserved))


def _can_be_escaped(char: str) -> bool:
    return char in ("\\", ":", "#", NEWLINE, TAB) or _kind(char) != ""


def _is_hidden(char: str, previous: str, following: str) -> bool:
    if " " <= char <= "~":
        return False
    kind = _kind(char)
    if kind == "joiner":
        return not _shapes(previous, following)
    if kind == "selector":
        return not _can_be_varied(previous)
    if kind == "mark":
        return not previous
    return kind == "hidden"


@functools.lru_cache(maxsize=16384)
def _kind(char: str) -> str:
    """Classify a character by whether it is escaped.

    Returns:
        ``hidden`` if it is always escaped; ``joiner``, ``selector`` or ``mark`` if that depends on its neighbours;
        ``""`` if it never is.
    """
    if char in _JOINERS:
        return "joiner"
    if _is_within(char, _SELECTOR_RANGES):
        return "selector"
    if char in _DRAWN_FORMAT:
        return ""
    category = unicodedata.category(char)
    if category in ("Cc", "Cf", "Cs", "Zl", "Zp") or char in _BLANK or _is_within(char, _BLANK_RANGES):
        return "hidden"
    return "mark" if category in ("Mn", "Me") else ""


def _is_within(char: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= ord(char) <= last for first, last in ranges)


def _shapes(previous: str, following: str) -> bool:
    """Whether a joiner between two characters is part of the spelling, as in emoji, Indic and right-to-left scripts."""
    if not previous or following.strip() == "" or _kind(following) not in ("", "mark"):
        return False
    if _VIRAMA in (unicodedata.combining(previous), unicodedata.combining(following)):
        return True
    if unicodedata.category(following)[0] == "S":
        return unicodedata.category(previous)[0] == "S" or previous == "\ufe0f"
    is_rtl = unicodedata.bidirectional(following) in ("AL", "R")
    return is_rtl and unicodedata.bidirectional(previous) in ("AL", "R", "NSM")


def _can_be_varied(previous: str) -> bool:
    """Whether a variation selector after ``previous`` is part of the spelling.

    A second selector in a row draws nothing, and ASCII letters have no variants.
    """
    if not previous or previous.isspace() or _kind(previous) in ("selector", "joiner"):
        return False
    return not (previous.isascii() and previous.isalpha())
