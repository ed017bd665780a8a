"""Splits a conversation into stretches of text for the page, marked by supervision and loss, some of them folded.

Colour is never the only cue: targets are underlined, more heavily for larger losses, the largest losses are written
after their tokens, and every token has a tooltip with all its figures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from glm4ft.report.content import ShownRow
from glm4ft.report.costly_tokens import show_id, token_parts
from glm4ft.text.token_text import TokenDecoder, Unit

# Upper ends, in nats, of the levels below the last: probabilities above 95 %, 61 % and 14 %.
LEVELS = (0.05, 0.5, 2.0)
LEVEL_NAMES = ("learnt", "nearly learnt", "poorly learnt", "not learnt")
CONTEXT_TOKENS = 12  # shown around each token of interest
LEAST_FOLDED = 24
NUMBERED = 12  # largest number of targets per conversation with their loss written after them
LEAST_NUMBERED = 0.05
MAX_LISTED = 400  # largest number of tokens in the table of a conversation

NOT_A_TARGET, MISSED = "trained, should not be", "not trained, should be"


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that are drawn alike.

    Args:
        text: The text, safe to show, with real newlines.
        is_control: True for a control token.
        supervised: True for a target.
        level: The index into ``LEVEL_NAMES``; None if the token is not a target or its loss is not known.
        number: The loss to write after the text, or "".
        wrong: ``NOT_A_TARGET`` or ``MISSED`` if the label is wrong, else "".
        title: The tooltip with all figures of the tokens.
    """

    text: str
    is_control: bool
    supervised: bool
    level: int | None = None
    number: str = ""
    wrong: str = ""
    title: str = ""


@dataclass(frozen=True)
class Stretch:
    """Pieces of text that are shown together, or folded behind a label if there is one."""

    pieces: tuple[Piece, ...]
    label: str = ""


@dataclass(frozen=True)
class ListedToken:
    """A row of the table below a conversation.

    Args:
        position: The position of the token.
        text: The text of the token, safe to show.
        part: The part of the conversation that the token belongs to.
        loss: The loss of the token; None if not known.
        floor: The certified lower bound of the loss; None if not known.
        said: The token that the model finds likelier; "" if there is none.
        wrong: ``NOT_A_TARGET`` or ``MISSED`` if the label is wrong, else "".
    """

    position: int
    text: str
    part: str
    loss: float | None
    floor: float | None
    said: str
    wrong: str


def stretches(row: ShownRow, tokenizer: Any) -> list[Stretch]:
    """Split a conversation into stretches; the label of a fold states the number, kind and parts of its tokens."""
    decoder, parts = TokenDecoder(tokenizer), token_parts(row.input_ids, tokenizer)
    units = list(decoder.units(row.input_ids))
    numbered = _dearest(row, units)
    is_open = _worth_a_look(row, units, numbered)
    found, shown = [], zip(units, decoder.show_units(units), strict=True)
    for keep, group in itertools.groupby(shown, key=lambda pair: is_open[pair[0].start]):
        run = list(group)
        start, end = run[0][0].start, run[-1][0].end
        label = "" if keep or end - start < LEAST_FOLDED else _fold_label(row, start, end, parts)
        found.append(Stretch(tuple(_pieces(row, run, parts, numbered, decoder)), label))
    return found


def listed_tokens(row: ShownRow, tokenizer: Any) -> list[ListedToken]:
    """List the figures of the first ``MAX_LISTED`` tokens that are targets or have a wrong label."""
    decoder, parts = TokenDecoder(tokenizer), token_parts(row.input_ids, tokenizer)
    listed = []
    for unit in decoder.units(row.input_ids):
        for at in range(unit.start, unit.end):
            if row.supervised[at] or _wrong(row, at):
                text = decoder.show_token(row.input_ids[at], at, unit)
                loss = row.losses[at] if row.losses else None
                floor = row.floors[at] if row.floors else None
                listed.append(ListedToken(at, text, parts[at], loss, floor, _said(row, at, decoder), _wrong(row, at)))
                if len(listed) == MAX_LISTED:
                    return listed
    return listed


def level_of(loss: float) -> int:
    """Return the index of a loss into ``LEVEL_NAMES``; NaN counts as not learnt."""
    return next((level for level, end in enumerate(LEVELS) if loss < end), len(LEVELS))


def _cost(row: ShownRow, unit: Unit) -> float | None:
    """Return the largest loss of the unit's targets; None if it has none, or no loss is known."""
    span = range(unit.start, unit.end)
    losses = [row.losses[at] for at in span if row.supervised[at]] if row.losses else []
    known = [loss for loss in losses if loss is not None]
    return max(known, default=None)


def _dearest(row: ShownRow, units: Iterable[Unit]) -> set[int]:
    """Return the first positions of the units with the largest losses, which are written after them."""
    costs = [(cost, unit.start) for unit in units if (cost := _cost(row, unit)) is not None and cost >= LEAST_NUMBERED]
    return {start for _, start in sorted(costs, reverse=True)[:NUMBERED]}


def _worth_a_look(row: ShownRow, units: Sequence[Unit], numbered: set[int]) -> list[bool]:
    """Mark positions near the row's ends, control tokens, boundaries of targets, large losses and wrong labels."""
    size = len(row.input_ids)
    spots = {0, size - 1, *numbered} | {at for at in range(size) if _wrong(row, at)}
    spots |= {unit.start for unit in units if unit.is_control}
    spots |= {at for at in range(1, size) if row.supervised[at] != row.supervised[at - 1]}
    near = [False] * size
    for at in spots:
        for position in range(max(0, at - CONTEXT_TOKENS), min(size, at + CONTEXT_TOKENS)):
            near[position] = True
    for unit in units:
        near[unit.start : unit.end] = [any(near[unit.start : unit.end])] * (unit.end - unit.start)
    return near


def _fold_label(row: ShownRow, start: int, end: int, parts: Sequence[str]) -> str:
    whose = ", ".join(dict.fromkeys(part for part in parts[start:end] if "header" not in part)) or "header"
    num_supervised = sum(row.supervised[start:end])
    kind = "ignored" if not num_supervised else "supervised" if num_supervised == end - start else "more"
    return f"{end - start:,} {kind} tokens ({whose})"


def _pieces(
    row: ShownRow,
    run: Sequence[tuple[Unit, str]],
    parts: Sequence[str],
    numbered: set[int],
    decoder: TokenDecoder,
) -> Iterable[Piece]:
    def alike(shown: tuple[Unit, str]) -> int:
        unit = shown[0]
        return unit.start if unit.is_control or row.supervised[unit.start] or _wrong(row, unit.start) else -1

    for start, group in itertools.groupby(run, key=alike):
        shown = list(group)
        if start < 0:
            yield Piece("".join(text for _, text in shown), False, False)
        else:
            ((unit, text),) = shown
            yield _piece(row, unit, text, parts[start], start in numbered, decoder)


def _piece(row: ShownRow, unit: Unit, text: str, part: str, is_numbered: bool, decoder: TokenDecoder) -> Piece:
    cost, wrong = _cost(row, unit), _wrong(row, unit.start)
    return Piece(
        text=text,
        is_control=unit.is_control,
        supervised=any(row.supervised[unit.start : unit.end]),
        level=None if cost is None else level_of(cost),
        number=f"{cost:.2f}" if is_numbered and cost is not None else "",
        wrong="" if wrong and unit.start and _wrong(row, unit.start - 1) == wrong else wrong,
        title="\n".join(_describe(row, at, part, decoder) for at in range(unit.start, unit.end)),
    )


def _describe(row: ShownRow, at: int, part: str, decoder: TokenDecoder) -> str:
    facts = [f"{show_id(row.input_ids[at], decoder)}, token {at}, {part}"]
    facts.append("supervised" if row.supervised[at] else "ignored")
    loss = row.losses[at] if row.losses else None
    if loss is not None:
        facts.append(f"loss {loss:.4g} (probability {math.exp(-loss):.2%})")
    floor = row.floors[at] if row.floors else None
    if floor is not None:
        facts.append(f"certified floor {floor:.4g}")
    said = _said(row, at, decoder)
    return ", ".join([*facts, *([f"the model says {said}"] if said else []), *filter(None, [_wrong(row, at)])])


def _said(row: ShownRow, at: int, decoder: TokenDecoder) -> str:
    """Format the token that the model finds likelier than the true one; "" if the true token is the likeliest."""
    said = row.said[at] if row.said else None
    return "" if said is None or said == row.input_ids[at] else show_id(said, decoder)


def _wrong(row: ShownRow, at: int) -> str:
    if not row.expected or row.expected[at] == row.supervised[at]:
        return ""
    return NOT_A_TARGET if row.supervised[at] else MISSED
