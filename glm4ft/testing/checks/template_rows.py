"""What the mask of a row must be by the chat template of the base, for subjects outside the GLM-4 family."""

from __future__ import annotations

from glm4ft.testing.checks.encoding import BankRow, fail
from glm4ft.testing.specification.chat_template import WHY, answers, find_mistakes
from glm4ft.testing.specification.mask_oracle import IGNORED, show_token
from glm4ft.testing.trial.trial import Trial
from glm4ft.testing.trial.turns import template_marks


def require_mask_of_template(trial: Trial, row: BankRow) -> None:
    """Fail unless every assistant turn is trained, and of each exactly what the model must sample.

    Args:
        trial: The trial of the subject that encoded the row.
        row: The row.
    Raises:
        CheckFailed: If a label is wrong; the message shows the first.
        NotApplicable: If the template does not mark answers by tokens of their own.
    """
    marks, tokenizer = template_marks(trial), trial.subject.tokenizer
    wanted = [index for index, message in enumerate(row.talk.messages) if message["role"] == "assistant"]
    found = answers(row.ids, marks)
    if len(found) != len(wanted):
        fail(trial, row, f"{len(found)} assistant headers for {len(wanted)} assistant turns", len(row.ids))
    for mistake in find_mistakes(tokenizer, row.ids, row.labels, marks):
        where, is_now = f"position {mistake.position} {show_token(tokenizer, row.ids, mistake.position)}", "supervised"
        if mistake.position == len(row.ids) or not mistake.is_trained:
            is_now = "ignored" if mistake.position < len(row.ids) else "missing"
        fail(trial, row, f"{where} is {is_now}: {WHY[mistake.kind]}", mistake.position)
    for number, (turn, index) in enumerate(zip(found, wanted, strict=True), 1):
        if all(row.labels[at] == IGNORED for at in turn if at < len(row.ids)):
            fail(trial, row, f"turn {number} (message {index}) is ignored, should be supervised", turn.start)


def require_stops_of_template(trial: Trial, row: BankRow) -> None:
    """Fail unless each trained turn ends in one supervised token, at which generation stops.

    Args:
        trial: The trial of the subject that encoded the row.
        row: The row.
    Raises:
        CheckFailed: If the token is missing, not supervised, or no stop id; the message shows it.
        NotApplicable: If the template does not mark answers by tokens of their own.
    """
    for number, turn in enumerate(answers(row.ids, template_marks(trial)), 1):
        if all(row.labels[at] == IGNORED for at in turn if at < len(row.ids)):
            continue  # of a turn that is not trained nothing is claimed
        if turn.stop > len(row.ids):
            fail(trial, row, f"turn {number}: no terminator; the row ends after the answer", len(row.ids))
        token = f"turn {number}: position {turn[-1]}, the terminator"
        if row.labels[turn[-1]] == IGNORED:
            fail(trial, row, f"{token}, is ignored, should be supervised", turn[-1])
        if trial.stop_ids is not None and row.ids[turn[-1]] not in trial.stop_ids:
            fail(trial, row, f"{token}, is not among the subject's stop_ids {trial.stop_ids}", turn[-1])
