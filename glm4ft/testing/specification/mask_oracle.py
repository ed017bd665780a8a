r"""Decides which positions of a row must be supervised, independently of any pipeline's encoder.

In GLM-4's formats control tokens alone delimit a turn, so scanning a row's ids is enough: after ``<|assistant|>``, and
what serving writes behind it where a model may think, every token is a target, up to and including the next role's
token. How the ids were made does not matter, so the oracle applies to any pipeline. Sources: ``openai_api_server.py``
and the text script of THUDM/GLM-4, where the stop list holds ``<|user|>``, ``<|observation|>`` and ``<|endoftext|>``;
the generation prompts of the chat templates of GLM-Z1, GLM-4.5 and GLM-4.7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm4ft.testing.specification.turn_text import ALWAYS_THINKS

IGNORED = -100
PREFIX = ("[gMASK]", "<sop>")
HEADERS = {
    "system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "observation": "<|observation|>",
    "tool": "<|observation|>",
}  # fmt: skip
END_OF_TEXT = "<|endoftext|>"
# How a prompt may go on after the header. Elsewhere the header is its end.
GIVEN = {
    "glm-z1-0414": ("\n<think>",),
    "glm-4.5": ("\n<think></think>",),
    "glm-4.7": ("<think>", "</think>"),
}

WHY = {
    "prefix": "a prefix token, which serving sends",
    "header": "a header, which serving sends and the model never samples",
    "terminator": "the terminator, which the model must sample to stop",
    "answer": "part of the answer, which the model must sample",
    "given": "what serving writes behind the header, which the model never samples",
    "not asked for": "part of a turn that no prompt of serving asks for",
    "loss false": "part of a turn whose loss is false",
    "context": "context, which the model is given",
}


class Undecidable(Exception):
    """A row's control tokens do not match its conversation, so its mask cannot be judged; the message states why."""


@dataclass(frozen=True)
class TurnSpan:
    """The location of an assistant turn in a row.

    Args:
        message: The index of the turn's message in the conversation.
        header: The position of ``<|assistant|>``.
        start: The first position that the model samples.
        end: The position of the next control token, the turn's terminator; the row's length if there is none.
        supervised: False if the message has ``loss: false``, or no prompt asks for the turn.
        asked: Whether a prompt of serving asks for the turn.
    """

    message: int
    header: int
    start: int
    end: int
    supervised: bool
    asked: bool = True


@dataclass(frozen=True)
class Mistake:
    """One position whose label is wrong.

    Args:
        kind: The kind of token at the position, a key of ``WHY``.
        position: The position in the row; the row's length for a missing terminator.
        is_supervised: Whether the row supervises the position; the opposite is right.
    """

    kind: str
    position: int
    is_supervised: bool


def control_ids(tokenizer: Any) -> dict[str, int]:
    """The ids of the control tokens that the formats use, by token.

    Raises:
        Undecidable: If the tokenizer lacks one of them.
    """
    added = tokenizer.get_added_vocab()
    needed = [*PREFIX, *dict.fromkeys(HEADERS.values()), END_OF_TEXT]
    missing = [token for token in needed if token not in added]
    if missing:
        raise Undecidable(f"the tokenizer lacks control tokens of GLM-4: {', '.join(missing)}")
    return {token: added[token] for token in needed}


def find_turns(
    ids: Sequence[int],
    messages: Sequence[Mapping[str, Any]],
    controls: Mapping[str, int],
    tokenizer: Any = None,
    chat_format: str = "",
) -> list[TurnSpan]:
    """Locate the assistant turns of a row by its control tokens.

    Args:
        ids: The token ids of the row.
        messages: The messages that the row encodes; one that ``continues`` is of the same turn as the one before it.
        controls: The ids of the control tokens, from ``control_ids``.
        tokenizer: The tokenizer that made the ids; needed only for a format with reasoning.
        chat_format: The name of the chat format.
    Returns:
        The assistant turns, in order.
    Raises:
        Undecidable: If the row has more or fewer ``<|assistant|>`` than there are assistant messages.
    """
    known, bounds, header = set(controls.values()), [], None
    for position, token in enumerate(ids):
        if token in known:
            if header is not None:
                bounds.append((header, position))
            header = position if token == controls[HEADERS["assistant"]] else None
    if header is not None:
        bounds.append((header, len(ids)))
    answers = [
        (index, m.get("loss") is not False)
        for index, m in enumerate(messages)
        if m["role"] == "assistant" and not m.get("continues")
    ]
    if len(bounds) != len(answers):
        raise Undecidable(f"{len(bounds)} {HEADERS['assistant']} for {len(answers)} assistant turns")
    given = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in GIVEN.get(chat_format, ())]
    turns = []
    for (header, end), (index, loss) in zip(bounds, answers, strict=True):
        behind = next((len(x) for x in given if tuple(ids[header + 1 : header + 1 + len(x)]) == x), 0)
        asked = behind > 0 or chat_format not in ALWAYS_THINKS
        turns.append(TurnSpan(index, header, header + 1 + behind, end, loss and asked, asked))
    return turns


def find_mistakes(
    ids: Sequence[int], labels: Sequence[int], turns: Sequence[TurnSpan], controls: Mapping[str, int]
) -> Iterator[Mistake]:
    """Compare a row's labels with the tokens that the model must sample, position by position.

    Args:
        ids: The token ids of the row.
        labels: The labels, one per token, -100 where a token is not supervised.
        turns: The assistant turns of the row, from ``find_turns``.
        controls: The ids of the control tokens, from ``control_ids``.
    Yields:
        One mistake per position whose label is wrong.
    """
    owner = {position: turn for turn in turns for position in range(turn.header + 1, turn.end + 1)}
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        turn = owner.get(position)
        should = turn is not None and turn.supervised and position >= turn.start
        if (label != IGNORED) != should:
            yield Mistake(_kind(position, token, turn, controls), position, not should)
    if turns and turns[-1].supervised and turns[-1].end == len(ids):
        yield Mistake("terminator", len(ids), False)


def _kind(position: int, token: int, turn: TurnSpan | None, controls: Mapping[str, int]) -> str:
    if turn is not None and position < turn.start:
        return "given"
    if turn is not None and turn.supervised:
        return "terminator" if position == turn.end else "answer"
    if token == controls[HEADERS["assistant"]]:
        return "header"
    if turn is not None:
        return "loss false" if turn.asked else "not asked for"
    return "prefix" if token in (controls[name] for name in PREFIX) else "context"


def legal_stops(messages: Sequence[Mapping[str, Any]], index: int) -> tuple[str, ...]:
    """The control tokens that may end an assistant turn.

    Args:
        messages: The messages of the conversation.
        index: The index of the assistant message.
    Returns:
        The header of the next message; for the last message, the header that would follow it and ``<|endoftext|>``.
    """
    if index + 1 < len(messages):
        return (HEADERS[messages[index + 1]["role"]],)
    return (HEADERS["observation" if messages[index].get("metadata") else "user"], END_OF_TEXT)


def show_tokens(tokenizer: Any, ids: Sequence[int], position: int, *, before: int = 4, after: int = 2) -> str:
    """Show the tokens around a position, each with its position; the one in question is in brackets.

    Args:
        tokenizer: The tokenizer that made the ids.
        ids: The token ids of the row.
        position: The position in question; the row's length for a token that is missing at the end.
        before: The number of tokens to show before it.
        after: The number of tokens to show after it.
    """
    around = range(max(0, position - before), min(len(ids), position + after + 1))
    shown = [f"{i} {show_token(tokenizer, ids, i)}" for i in around]
    if position < len(ids):
        shown[position - around.start] = f"[{shown[position - around.start]}]"
    else:
        shown.append(f"[{position} end of the row]")
    return "  ".join(shown)


def show_token(tokenizer: Any, ids: Sequence[int], position: int) -> str:
    """The text of one token, quoted."""
    return repr(tokenizer.decode([ids[position]])) if position < len(ids) else "end of the row"


def explain_mistakes(tokenizer: Any, ids: Sequence[int], turns: Sequence[TurnSpan], mistakes: Sequence[Mistake]) -> str:
    """Describe the first mistake of each kind, with the tokens around it and the number of mistakes of that kind.

    Args:
        tokenizer: The tokenizer that made the ids.
        ids: The token ids of the row.
        turns: The assistant turns of the row.
        mistakes: The mistakes, at least one.
    """
    lines = []
    for kind in dict.fromkeys(mistake.kind for mistake in mistakes):
        same = [mistake for mistake in mistakes if mistake.kind == kind]
        lines.append(_explain_mistake(tokenizer, ids, turns, same[0]) + f" ({len(same)} like it)" * (len(same) > 1))
        lines.append(f"  {show_tokens(tokenizer, ids, same[0].position)}")
    return "\n".join(lines)


def _explain_mistake(tokenizer: Any, ids: Sequence[int], turns: Sequence[TurnSpan], mistake: Mistake) -> str:
    position = mistake.position
    if position == len(ids):
        return f"turn {len(turns)} (message {turns[-1].message}): no terminator; the row ends at position {position}"
    number = next((n for n, turn in enumerate(turns, 1) if position <= turn.end), 0)
    where = f"turn {number} (message {turns[number - 1].message})" if number else "after the last turn"
    if number and position < turns[number - 1].header:
        where = f"before turn {number}"
    is_now, should = ("supervised", "ignored") if mistake.is_supervised else ("ignored", "supervised")
    text = show_token(tokenizer, ids, position)
    return f"{where}: position {position} {text} is {is_now}, should be {should}: {WHY[mistake.kind]}"
