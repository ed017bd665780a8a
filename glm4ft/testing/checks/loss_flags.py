"""Claims about the flags by which a conversation takes single turns out of training."""

from __future__ import annotations

from typing import Any

from glm4ft.data.control_tokens import common_prefix_length
from glm4ft.testing.checks.encoding import BankRow, fail, name_of, row_of
from glm4ft.testing.specification.mask_oracle import IGNORED, show_token
from glm4ft.testing.trial.bank import BANK, FLAGGED, TRAILING, Talk
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial


@check(stage="rows", incident="ms-swift 9266: flags lost when turns were merged")
def check_loss_flag_is_honoured(trial: Trial) -> None:
    """``loss: false`` removes exactly the targets of its own turn and changes no id."""
    plain = row_of(trial, next(talk for talk in BANK if talk.id == "several turns"))
    answers = [i for i, message in enumerate(plain.talk.messages) if message["role"] == "assistant"]
    if len(plain.runs) != len(answers):
        raise NotApplicable(f"not judged: {len(plain.runs)} supervised runs for {len(answers)} assistant turns")
    for number, (index, own) in enumerate(zip(answers, plain.runs, strict=True), 1):
        messages = [{**m, "loss": False} if i == index else m for i, m in enumerate(plain.talk.messages)]
        row = row_of(trial, Talk(f"several turns, loss of message {index} false", tuple(messages)))
        if row.ids != plain.ids:
            where = common_prefix_length(row.ids, plain.ids)
            fail(trial, row, f"the flag changes the ids at position {where}", where)
        for position, (label, before) in enumerate(zip(row.labels, plain.labels, strict=True)):
            should = before != IGNORED and position not in own
            if (label != IGNORED) != should:
                words = ("supervised", "ignored") if should else ("ignored", "supervised")
                text = show_token(trial.subject.tokenizer, row.ids, position)
                problem = f"turn {number} (message {index}) has loss false: position {position} {text}"
                fail(trial, row, f"{problem} is {words[1]}, should be {words[0]}", position)


@check(stage="rows", incident="OpenAI's weight is 0 or 1; a column filled with null took targets away")
def check_loss_flag_means_the_same_in_every_spelling(trial: Trial) -> None:
    """A loss flag given as a number, a word or null is honoured as the flag that it means, or refused with an error."""
    plain = row_of(trial, next(talk for talk in BANK if talk.id == "several turns"))
    index = next(i for i, message in enumerate(plain.talk.messages) if message["role"] == "assistant")

    def with_flag(value: Any) -> BankRow | None:
        messages = [{**m, "loss": value} if i == index else m for i, m in enumerate(plain.talk.messages)]
        try:
            return row_of(trial, Talk(f"several turns, loss of message {index} {value!r}", tuple(messages)))
        except NotApplicable:
            raise
        except Exception:  # refusing a spelling is right
            return None

    off = with_flag(False)
    if off is None or off.labels == plain.labels:
        raise NotApplicable("not judged: loss false is refused, or changes nothing")
    for value in (0, 0.0, "false", 1, 1.0, True, None):
        row, means = with_flag(value), plain if value in (1, True, None) else off
        if row is not None and row.labels != means.labels:
            taken = "false" if row.labels == off.labels else "true" if row.labels == plain.labels else "something else"
            expected = "true" if means is plain else "false"
            where = f"conversation {name_of(plain.talk)}, message {index}"
            raise CheckFailed(f"{where}: a loss flag of {value!r} is taken for {taken}, it means {expected}")


@check(stage="rows", incident="alpaca-lora 4a712d4, GLM-4 finetune.py combine: text that nobody answered was trained")
def check_conversation_without_targets_is_not_trained(trial: Trial) -> None:
    """Turns with ``loss: false`` and messages that no answer follows have no targets; refusing them is accepted."""
    row = row_of(trial, TRAILING)
    first = row_of(trial, Talk("without the trailing message", TRAILING.messages[:-1]))
    shared = common_prefix_length(row.ids, first.ids)
    late = [i for run in row.runs for i in run if i > shared]  # at ``shared`` itself is the last turn's stop token
    if late:
        text = show_token(trial.subject.tokenizer, row.ids, late[0])
        fail(trial, row, f"position {late[0]} {text} is supervised, should be ignored: no answer follows it", late[0])
    messages = [{**m, "loss": False} if m["role"] == "assistant" else m for m in FLAGGED.messages]
    try:
        silent = row_of(trial, Talk("every loss false", tuple(messages)))
    except NotApplicable:
        raise
    except Exception:  # an error is what a pipeline should rather raise than train nothing
        return
    if silent.runs:
        start = silent.runs[0].start
        text = show_token(trial.subject.tokenizer, silent.ids, start)
        problem = f"every loss is false, but position {start} {text} is supervised, should be ignored"
        fail(trial, silent, problem, start)
