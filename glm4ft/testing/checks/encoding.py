"""What checks of rows have in common: the bank as a subject encodes it, and failures that show the tokens."""

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
from glm4ft.testing.trial.bank import BANK, MARKERS_TALK, Talk
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

DENSE_FORMATS = ("glm-4-9b-chat", "glm-4-0414")


@dataclass(frozen=True)
class BankRow:
    """What the subject made of a conversation; ids and labels have one length."""

    talk: Talk
    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def runs(self) -> list[range]:
        """Maximal runs of supervised positions."""
        positions = [i for i, label in enumerate(self.labels) if label != IGNORED]
        runs = [[i for _, i in run] for _, run in groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0])]
        return [range(run[0], run[-1] + 1) for run in runs]


def bank_of(trial: Trial) -> list[Talk]:
    """The bank without what the subject has no words for, or refuses; tools need a base whose template knows them."""
    knows_tools = is_glm(trial) and "tools" in str(trial.base_tokenizer.chat_template or "")
    talks = [talk for talk in BANK if (knows_tools or not talk.tools) and trial.accepts(conversation_of(talk))]
    if not talks:
        raise NotApplicable("not judged: the subject refuses every conversation of the bank")
    return [talk for talk in talks if talk is not MARKERS_TALK or _keeps_markers(trial)]


def _keeps_markers(trial: Trial) -> bool:
    """False if marker text becomes headers: that has a check of its own, and would only hide other faults in others."""
    if not is_glm(trial):
        return True
    try:
        ((ids, _),) = trial.rows([conversation_of(MARKERS_TALK)])
        find_turns(ids, MARKERS_TALK.messages, control_ids(trial.subject.tokenizer))
    except Undecidable:
        return False
    return True


def conversation_of(talk: Talk) -> dict[str, Any]:
    """As ``encode`` takes it."""
    return copy.deepcopy({"messages": list(talk.messages), "tools": list(talk.tools) if talk.tools else None})


def row_of(trial: Trial, talk: Talk) -> BankRow:
    """What the subject makes of a conversation."""
    ((ids, labels),) = trial.rows([conversation_of(talk)])
    if len(ids) != len(labels):
        raise NotApplicable("not judged: ids and labels differ in length")
    return BankRow(talk, ids, labels)


def is_glm(trial: Trial) -> bool:
    """Whether the subject names one of the formats that the oracle knows."""
    return getattr(trial.subject, "chat_format", None) in DENSE_FORMATS


def controls_of(trial: Trial) -> dict[str, int]:
    """Control token to id, for claims that need a GLM-4 format."""
    if not is_glm(trial):
        found = getattr(trial.subject, "chat_format", None)
        raise NotApplicable(f"the claim is about {' and '.join(DENSE_FORMATS)}; the subject's chat_format is {found}")
    try:
        return control_ids(trial.subject.tokenizer)
    except Undecidable as error:
        raise CheckFailed(str(error)) from error


def turns_of(trial: Trial, row: BankRow, controls: Mapping[str, int]) -> list[TurnSpan]:
    """The assistant turns of a row."""
    try:
        return find_turns(row.ids, row.talk.messages, controls)
    except Undecidable as error:
        raise CheckFailed(f"conversation {name_of(row.talk)}: {error}") from error


def judged(trial: Trial) -> Iterator[tuple[BankRow, list[TurnSpan]]]:
    """The rows of the bank with their turns."""
    controls = controls_of(trial)
    for talk in bank_of(trial):
        row = row_of(trial, talk)
        yield row, turns_of(trial, row, controls)


def answer_starts(trial: Trial, row: BankRow) -> list[int]:
    """Where each answer begins: behind its header in a GLM-4 format, else where a supervised run does."""
    if is_glm(trial):
        return [turn.header + 1 for turn in turns_of(trial, row, controls_of(trial))]
    return [run.start for run in row.runs]


def name_of(talk: Talk) -> str:
    """A conversation as messages show it."""
    return f"{BANK.index(talk) + 1} ({talk.id})" if talk in BANK else f"({talk.id})"


def fail(trial: Trial, row: BankRow, problem: str, position: int) -> NoReturn:
    """Fail with the tokens around a position."""
    shown = show_tokens(trial.subject.tokenizer, row.ids, position)
    raise CheckFailed(f"conversation {name_of(row.talk)}, {problem}\n  {shown}")


def value_at(values: Sequence[int], position: int) -> str:
    """A value, or that there is none."""
    return str(values[position]) if position < len(values) else "missing"
