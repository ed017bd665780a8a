"""Helpers of the checks of rows: the bank of conversations as a subject encodes it, and failures that show tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn

from glm4ft.testing.specification.mask_oracle import (
    IGNORED,
    TurnSpan,
    Undecidable,
    control_ids,
    find_turns,
    show_tokens,
)
from glm4ft.testing.specification.turn_text import ALWAYS_THINKS, THINKING_FORMATS, openai_messages
from glm4ft.testing.trial.bank import (
    BANK,
    CALL_TALK,
    MARKERS_TALK,
    PARALLEL,
    THINKING,
    TWO_QUESTIONS,
    Talk,
    with_reasoning,
)
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial
from glm4ft.testing.trial.turns import sampled_spans

DENSE_FORMATS = ("glm-4-9b-chat", "glm-4-0414")
GLM_FORMATS = (*DENSE_FORMATS, *THINKING_FORMATS)


@dataclass(frozen=True)
class BankRow:
    """A conversation as the subject encoded it; ids and labels have the same length."""

    talk: Talk
    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def runs(self) -> list[range]:
        """The maximal runs of consecutive supervised positions."""
        positions = [i for i, label in enumerate(self.labels) if label != IGNORED]
        runs = [[i for _, i in run] for _, run in groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0])]
        return [range(run[0], run[-1] + 1) for run in runs]


def bank_of(trial: Trial) -> list[Talk]:
    """The conversations of the bank that the subject accepts; those with tools if the base's template renders tools."""
    knows_tools = is_glm(trial) and "tools" in str(trial.base_tokenizer.chat_template or "")
    bank = BANK + (TWO_QUESTIONS,) * is_glm(trial) + THINKING * (chat_format_of(trial) in THINKING_FORMATS)
    if chat_format_of(trial) in ALWAYS_THINKS:  # which no prompt asks for a call
        bank = tuple(talk for talk in bank if talk not in (CALL_TALK, PARALLEL))
    talks = [talk for talk in bank if (knows_tools or not talk.tools) and trial.accepts(conversation_of(trial, talk))]
    if not talks:
        raise NotApplicable("not judged: the subject refuses every conversation of the bank")
    return [as_asked(trial, talk) for talk in talks if talk.id != MARKERS_TALK.id or _keeps_markers(trial)]


def as_asked(trial: Trial, talk: Talk) -> Talk:
    """A conversation as serving asks for its last answer: with reasoning if the model always thinks."""
    return with_reasoning(talk) if chat_format_of(trial) in ALWAYS_THINKS else talk


def _keeps_markers(trial: Trial) -> bool:
    """Whether marker text stays text. If not, one check reports it; in the others it would only hide other faults."""
    if not is_glm(trial):
        return True
    try:
        ((ids, _),) = trial.rows([conversation_of(trial, MARKERS_TALK)])
        find_turns(ids, MARKERS_TALK.messages, control_ids(trial.subject.tokenizer))
    except Undecidable:
        return False
    return True


def conversation_of(trial: Trial, talk: Talk) -> dict[str, Any]:
    """A copy of a conversation in the form that ``encode`` accepts."""
    talk = as_asked(trial, talk)
    return copy.deepcopy({"messages": list(talk.messages), "tools": list(talk.tools) if talk.tools else None})


def row_of(trial: Trial, talk: Talk) -> BankRow:
    """A conversation encoded by the subject; skips the check if ids and labels differ in length."""
    ((ids, labels),) = trial.rows([conversation_of(trial, talk)])
    if len(ids) != len(labels):
        raise NotApplicable("not judged: ids and labels differ in length")
    return BankRow(as_asked(trial, talk), ids, labels)


def is_glm(trial: Trial) -> bool:
    """Whether the subject's chat format is one that the mask oracle knows."""
    return chat_format_of(trial) in GLM_FORMATS


def chat_format_of(trial: Trial) -> str:
    """The name of the subject's chat format; "" if it has none."""
    return str(getattr(trial.subject, "chat_format", None) or "")


def controls_of(trial: Trial) -> dict[str, int]:
    """The id of each control token; skips the check if the subject has no GLM-4 chat format."""
    if not is_glm(trial):
        found = getattr(trial.subject, "chat_format", None)
        raise NotApplicable(f"the claim is about {' and '.join(GLM_FORMATS)}; the subject's chat_format is {found}")
    try:
        return control_ids(trial.subject.tokenizer)
    except Undecidable as error:
        raise CheckFailed(str(error)) from error


def turns_of(trial: Trial, row: BankRow, controls: Mapping[str, int]) -> list[TurnSpan]:
    """The assistant turns of a row."""
    try:
        return find_turns(row.ids, row.talk.messages, controls, trial.subject.tokenizer, chat_format_of(trial))
    except Undecidable as error:
        raise CheckFailed(f"conversation {name_of(row.talk)}: {error}") from error


def rows_with_turns(trial: Trial) -> Iterator[tuple[BankRow, list[TurnSpan]]]:
    """The encoded rows of the bank, each with its assistant turns."""
    controls = controls_of(trial)
    for talk in bank_of(trial):
        row = row_of(trial, talk)
        yield row, turns_of(trial, row, controls)


def answer_starts(trial: Trial, row: BankRow) -> list[int]:
    """First position of each answer: where the model begins to sample by its format or template.

    Of a template that does not tell it is the start of each supervised run.
    """
    if is_glm(trial):
        return [turn.start for turn in turns_of(trial, row, controls_of(trial))]
    try:
        return [turn.start for turn in sampled_spans(trial, row.ids)]
    except NotApplicable:
        return [run.start for run in row.runs]


def name_of(talk: Talk) -> str:
    """Number and id of a conversation, as messages show it."""
    return f"{BANK.index(talk) + 1} ({talk.id})" if talk in BANK else f"({talk.id})"


def fail(trial: Trial, row: BankRow, problem: str, position: int) -> NoReturn:
    """Raise ``CheckFailed`` with the problem and the tokens around a position."""
    shown = show_tokens(trial.subject.tokenizer, row.ids, position)
    raise CheckFailed(f"conversation {name_of(row.talk)}, {problem}\n  {shown}")


def as_served(trial: Trial, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a server passes them to the template of the subject's chat format.

    Args:
        trial: The trial of the subject.
        messages: Messages of the bank.
    Returns:
        The messages; those of the OpenAI API, calls with objects as arguments, where the format came after GLM-Z1.
    """
    if chat_format_of(trial) not in THINKING_FORMATS or chat_format_of(trial) in ALWAYS_THINKS:
        return [dict(message) for message in messages]
    return openai_messages(messages)


def value_at(values: Sequence[int], position: int) -> str:
    """The value at a position as text, or ``missing`` if the position is after the last."""
    return str(values[position]) if position < len(values) else "missing"
