"""The targets with the largest share of the loss, and the part of the conversation that each token belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm4ft.data.encoded_rows import TokenOrigin, token_origins, turn_markers
from glm4ft.report.content import ShownRow
from glm4ft.text.safe_text import visible
from glm4ft.text.token_text import TokenDecoder

LEAST_SHARE, LEAST_LOSS = 0.01, 0.05
PART_NAMES = {
    "prefix": "prefix", "header": "other headers", "assistant header": "<|assistant|> headers",
    "system": "system text", "user": "user text",
    "observation": "tool results", "assistant": "assistant text", "terminator": "ends of assistant turns",
    "token": "all",
}  # fmt: skip


@dataclass(frozen=True)
class CostlyToken:
    """All targets with the same id and the same part of the conversation.

    Args:
        text: The text of the token, safe to show.
        part: The part of the conversation, in words.
        count: The number of times the token is a target.
        loss: The mean loss over its occurrences.
        share: The share of the sum of all targets' losses, from 0 to 1.
        floor: The mean certified lower bound of the loss; None if not known.
        said: The token that the model most often finds likelier; "" if there is none.
    """

    text: str
    part: str
    count: int
    loss: float
    share: float
    floor: float | None
    said: str


def token_parts(input_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Label each token with its part of the conversation.

    Args:
        input_ids: The token ids of one row.
        tokenizer: The tokenizer, by whose control tokens or template the turns are told.
    Returns:
        One label per token: ``prefix``, ``assistant header``, ``header``, ``terminator``, or the role of the body. All
        labels are ``token`` if the tokenizer has neither.
    """
    markers = turn_markers(tokenizer)
    if not markers.headers:
        return ["token"] * len(input_ids)
    return [_part_name(place) for place in token_origins(input_ids, markers)]


def _part_name(place: TokenOrigin) -> str:
    if place.part == "header":
        return "assistant header" if place.role == "assistant" else "header"
    return place.role if place.part == "body" else place.part


def costly_tokens(rows: Iterable[ShownRow], tokenizer: Any, *, limit: int = 10) -> list[CostlyToken]:
    """Find the targets with the largest shares of the loss.

    Args:
        rows: The conversations; those without losses are ignored.
        tokenizer: The tokenizer of the conversations.
        limit: The largest number of tokens.
    Returns:
        The tokens, largest share first, each with at least ``LEAST_SHARE`` of the loss and ``LEAST_LOSS`` nats.
    """
    decoder, groups = TokenDecoder(tokenizer), dict[tuple[int, str], list[tuple[float, float | None, int | None]]]()
    for row in rows:
        for at, part, loss in _costs(row, tokenizer):
            floor = row.floors[at] if row.floors else None
            said = row.said[at] if row.said else None
            groups.setdefault((row.input_ids[at], part), []).append((loss, floor, said))
    total = math.fsum(loss for group in groups.values() for loss, _, _ in group)
    ranked = sorted(groups.items(), key=lambda item: -math.fsum(loss for loss, _, _ in item[1]))
    costly = [_costly(token_id, part, group, total, decoder) for (token_id, part), group in ranked[:limit]]
    return [token for token in costly if token.share >= LEAST_SHARE and token.loss >= LEAST_LOSS]


def part_counts(rows: Iterable[ShownRow], tokenizer: Any) -> Mapping[str, tuple[int, int, int | None]]:
    """Count the tokens of each part, those supervised, and those that should be (None if that is not known)."""
    counts: dict[str, tuple[int, int, int | None]] = {}
    for row in rows:
        expected: Sequence[bool | None] = row.expected or [None] * len(row.input_ids)
        for part, keep, right in zip(token_parts(row.input_ids, tokenizer), row.supervised, expected, strict=True):
            tokens, supervised, should = counts.get(part, (0, 0, 0))
            both = None if should is None or right is None else should + right
            counts[part] = tokens + 1, supervised + keep, both
    return counts


def _costs(row: ShownRow, tokenizer: Any) -> Iterator[tuple[int, str, float]]:
    """Yield the position, part and loss of each target whose loss is known."""
    parts = token_parts(row.input_ids, tokenizer)
    for at in row.targets if row.losses else ():
        loss = row.losses[at]
        if loss is not None:
            yield at, parts[at], loss


def _costly(
    token_id: int, part: str, group: list[tuple[float, float | None, int | None]], total: float, decoder: TokenDecoder
) -> CostlyToken:
    losses = [loss for loss, _, _ in group]
    floors = [floor for _, floor, _ in group if floor is not None]
    said = [token for _, _, token in group if token is not None and token != token_id]
    return CostlyToken(
        text=show_id(token_id, decoder),
        part=PART_NAMES.get(part, part),
        count=len(group),
        loss=math.fsum(losses) / len(losses),
        share=math.fsum(losses) / total if total > 0 else 0.0,
        floor=math.fsum(floors) / len(floors) if len(floors) == len(group) else None,
        said=show_id(max(set(said), key=said.count), decoder) if said else "",
    )


def show_id(token_id: int, decoder: TokenDecoder) -> str:
    """Format one token on one line: a control token by its name, any other by its text in quotes."""
    (unit,) = decoder.units([token_id])
    return visible(unit.text, newlines=False) if unit.is_control else f"'{decoder.show(unit.text, newlines=False)}'"
