"""Claims about single rows: the ids of an encoded conversation, and which of them are supervised.

Each check encodes conversations of the fixed bank in ``bank.py``. Claims about GLM-4's control tokens need a subject
with ``chat_format``; the others hold for every chat template.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from typing import Any

from glm4ft.data.control_tokens import common_prefix_length
from glm4ft.testing.checks.encoding import (
    DENSE_FORMATS,
    BankRow,
    answer_starts,
    bank_of,
    chat_format_of,
    controls_of,
    fail,
    is_glm,
    name_of,
    row_of,
    rows_with_turns,
    value_at,
)  # fmt: skip
from glm4ft.testing.checks.template_rows import require_mask_of_template, require_stops_of_template
from glm4ft.testing.specification.mask_oracle import (
    IGNORED,
    PREFIX,
    explain_mistakes,
    find_mistakes,
    legal_stops,
    show_token,
)
from glm4ft.testing.specification.turn_text import ALWAYS_THINKS, THINKING_FORMATS, carries_reasoning, sampled_text
from glm4ft.testing.trial.bank import MARKERS_TALK, Talk
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial


@check(stage="rows", incident="nanochat 1ddaad1: the renderer was right, the loader's mask was not")
def check_lists_have_one_length_and_labels_equal_ids_where_supervised(trial: Trial) -> None:
    """Ids and labels are lists of one length, each label is the id at its position or -100, and the first is -100."""
    for talk in bank_of(trial):
        row = trial.subject.encode(*copy.deepcopy((list(talk.messages), list(talk.tools) if talk.tools else None)))
        ids, labels = row["input_ids"], row["labels"]
        if not (isinstance(ids, list) and isinstance(labels, list)):
            raise CheckFailed(
                f"conversation {name_of(talk)}: {type(ids).__name__} and {type(labels).__name__}, not lists"
            )
        if len(ids) != len(labels):
            raise CheckFailed(f"conversation {name_of(talk)}: {len(ids)} input_ids but {len(labels)} labels")
        weights = row.get("weights", [1.0] * len(ids))
        if len(weights) != len(ids):
            raise CheckFailed(
                f"conversation {name_of(talk)}: {len(ids)} input_ids but {len(weights)} weights of tokens"
            )
        if wrong := [f"{w} at position {at}" for at, w in enumerate(weights) if not 0 <= w < math.inf]:
            raise CheckFailed(
                f"conversation {name_of(talk)}: {wrong[0]}, but weights of tokens are finite numbers from 0 on"
            )
        encoded = BankRow(talk, tuple(ids), tuple(labels))
        for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (token, IGNORED):
                text = f"{token} {show_token(trial.subject.tokenizer, ids, position)}"
                fail(trial, encoded, f"position {position}: label {label} over id {text}, should be equal", position)
        if labels and labels[0] != IGNORED:
            fail(trial, encoded, "position 0 is supervised, but nothing before it predicts it", 0)


@check(stage="rows", incident="GLM-4 issue 342: header trained, stop token not; TRL 6044 and 4201")
def check_mask_is_what_the_model_must_sample(trial: Trial) -> None:
    """Exactly the tokens after ``<|assistant|>``, up to and including the next control token, are supervised.

    In another template than GLM-4's, those from behind a turn's prompt up to and including what ends the turn.
    """
    if not is_glm(trial):
        for talk in bank_of(trial):
            require_mask_of_template(trial, row_of(trial, talk))
        return
    controls = controls_of(trial)
    for row, turns in rows_with_turns(trial):
        mistakes = list(find_mistakes(row.ids, row.labels, turns, controls))
        if mistakes:
            text = explain_mistakes(trial.subject.tokenizer, row.ids, turns, mistakes)
            raise CheckFailed(f"conversation {name_of(row.talk)}, wrong labels: {len(mistakes)}\n{text}")


@check(stage="rows", incident="unsloth-zoo 959, TRL 1509, open-r1 462: the template's prefix and the tokenizer's")
def check_prefix_occurs_once(trial: Trial) -> None:
    """``[gMASK]<sop>`` begins every row and does not occur again."""
    controls = controls_of(trial)
    prefix = [controls[token] for token in PREFIX]
    for talk in bank_of(trial):
        row = row_of(trial, talk)
        begin = list(row.ids[: len(prefix)])
        if begin != prefix:
            fail(trial, row, f"the row begins with {begin}, should begin with {''.join(PREFIX)} {prefix}", 0)
        again = [i for i, token in enumerate(row.ids) if token in prefix and i >= len(prefix)]
        if again and talk.id != MARKERS_TALK.id:
            text = show_token(trial.subject.tokenizer, row.ids, again[0])
            fail(trial, row, f"position {again[0]}: {text} is a second prefix, should occur once", again[0])


@check(stage="rows", incident="TRL 3091: no stop token after the last answer; LLaMA-Factory 7911: another one")
def check_every_turn_ends_in_one_stop(trial: Trial) -> None:
    """Every assistant turn ends in one supervised stop token, at which generation stops.

    It is the header of the next role, or one stop token appended to the conversation's last answer; in another template
    than GLM-4's, the token that the template writes behind an answer.
    """
    if not is_glm(trial):
        for talk in bank_of(trial):
            require_stops_of_template(trial, row_of(trial, talk))
        return
    controls, stop_ids = controls_of(trial), trial.stop_ids
    names = {token_id: token for token, token_id in controls.items()}
    for row, turns in rows_with_turns(trial):
        for number, turn in [(n, turn) for n, turn in enumerate(turns, 1) if turn.asked]:
            where, legal = f"turn {number} (message {turn.message})", legal_stops(row.talk.messages, turn.message)
            if turn.end == len(row.ids):
                fail(trial, row, f"{where}: no terminator; the row ends after the answer", turn.end)
            token = names[row.ids[turn.end]]
            problem = f"{where}: position {turn.end}, the terminator {token!r},"
            if token not in legal:
                fail(trial, row, f"{problem} should be {' or '.join(legal)}", turn.end)
            if turn.message + 1 == len(row.talk.messages) and turn.end + 1 != len(row.ids):
                fail(trial, row, f"{problem} should end the row, but tokens follow it", turn.end + 1)
            if row.labels[turn.end] == IGNORED:
                fail(trial, row, f"{problem} is ignored, should be supervised", turn.end)
            if stop_ids is not None and row.ids[turn.end] not in stop_ids:
                fail(trial, row, f"{problem} is not among the subject's stop_ids {stop_ids}", turn.end)


@check(stage="rows", incident="transformers 29279 and 47822: marker text in content became control ids")
def check_content_never_becomes_a_control_token(trial: Trial) -> None:
    """The control ids of a row depend on the roles alone; marker text in a message is encoded as ordinary text."""
    tokenizer = trial.subject.tokenizer
    added = tokenizer.get_added_vocab()
    if not is_glm(trial):  # a tokenizer may add ordinary words too
        added = {token: i for token, i in added.items() if i in tokenizer.all_special_ids}
    if not added:
        raise NotApplicable("the tokenizer has no control tokens")
    thinks = chat_format_of(trial) in THINKING_FORMATS  # whose answers may hold reasoning in tags, which is no text
    text, ids = "say " + " ".join(t for t in added if not (thinks and "think>" in t)), set(added.values())
    for talk in [t for t in bank_of(trial) if t.id in ("several turns", "system", "tool call")]:
        plain = [token for token in row_of(trial, talk).ids if token in ids]
        for index, message in enumerate(talk.messages):
            messages, is_object = [*talk.messages], thinks and bool(message.get("metadata"))
            messages[index] = {**message, "content": json.dumps({"days": 2, "city": text}) if is_object else text}
            row = row_of(trial, Talk(f"{talk.id} with marker text", tuple(messages), talk.tools))
            found = [i for i, token in enumerate(row.ids) if token in ids]
            where = common_prefix_length([row.ids[i] for i in found], plain)
            if len(found) > len(plain):
                position, role = found[where], message["role"]
                token = show_token(tokenizer, row.ids, position)
                problem = f"message {index} ({role}): {len(found)} control ids, should be {len(plain)} as with any text"
                fail(trial, row, f"{problem}; position {position} {token} comes from content", position)
            if [row.ids[i] for i in found] != plain:
                raise CheckFailed(f"conversation {name_of(row.talk)}: the text of message {index} changes control ids")


@check(stage="rows", incident="TRL 5559 and 6433: the template rewrites earlier turns once later ones follow")
def check_earlier_turns_do_not_change(trial: Trial) -> None:
    """Encoding only the first turns gives the beginning of the whole conversation's ids and labels.

    The last stop token of the shorter conversation may differ.
    """
    for talk in bank_of(trial):
        whole = row_of(trial, talk)
        answers = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
        if any(message.get("reasoning_content") for message in talk.messages):  # serving empties that of earlier turns
            answers = [index for index in answers if carries_reasoning(talk.messages, index)]
        ends = [index + 1 for index in answers]
        for number, end in enumerate(ends, 1):
            part = row_of(trial, Talk(f"{talk.id}, to turn {number}", talk.messages[:end], talk.tools))
            kept = max((run.stop for run in part.runs), default=1) - 1  # the stop token may differ at the end
            for name, before, after in (("ids", part.ids, whole.ids), ("labels", part.labels, whole.labels)):
                where = common_prefix_length(before[:kept], after)
                if where < kept:
                    problem = f"the {name} of the conversation to turn {number} change when more follows"
                    was = f"{before[where]} for {show_token(trial.subject.tokenizer, part.ids, where)}"
                    fail(trial, whole, f"{problem}; position {where} was {was}, is {value_at(after, where)}", where)


@check(stage="rows", incident="FastChat 2498, alpaca-lora fac5372: the span was off by one token at the seam")
def check_supervised_text_is_the_answer(trial: Trial) -> None:
    """Each assistant turn has one supervised run, which decodes to tool name, newline, content and stop token."""
    controls_of(trial)
    for talk in bank_of(trial):
        row = row_of(trial, talk)
        answers = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
        if chat_format_of(trial) in ALWAYS_THINKS:
            answers = answers[-1:]
        if len(row.runs) != len(answers):
            problem = f"{len(row.runs)} supervised runs, should be {len(answers)}, one per assistant turn"
            fail(trial, row, problem, row.runs[0].start if row.runs else len(row.ids))
        for number, (run, index) in enumerate(zip(row.runs, answers, strict=True), 1):
            message = talk.messages[index]
            text = trial.subject.tokenizer.decode(row.ids[run.start : run.stop], clean_up_tokenization_spaces=False)
            carries = carries_reasoning(talk.messages, index)
            body = sampled_text(message, chat_format_of(trial), carries=carries)
            legal = [body + stop for stop in legal_stops(talk.messages, index)]
            if text not in legal:
                problem = f"turn {number} (message {index}): positions {run.start} to {run.stop - 1}"
                fail(trial, row, f"{problem} decode to {text!r}, should be {legal[0]!r}", run.start)


@check(stage="rows", incident="LLaMA-Factory e734222: a system message vanished in some layouts")
def check_every_message_is_in_the_row(trial: Trial) -> None:
    """A row decodes to all message texts in order, verbatim in a GLM-4 format; other formats may strip white space."""
    for talk in bank_of(trial):
        row, found = row_of(trial, talk), 0
        text = trial.subject.tokenizer.decode(row.ids, clean_up_tokenization_spaces=False)
        for index, message in enumerate(talk.messages):
            content = _lasting_text(trial, message)
            begin = text.find(content, found)
            if begin < 0:
                problem = f"message {index} ({message['role']}), {content!r}, is not in the row"
                raise CheckFailed(f"conversation {name_of(talk)}, {problem}, {text!r}")
            found = begin + len(content)


def _lasting_text(trial: Trial, message: Mapping[str, Any]) -> str:
    """The text of a message that its row holds whatever the format: of a call, written anew, the tool's name."""
    if chat_format_of(trial) in DENSE_FORMATS:
        return str(message["content"])
    is_rewritten = chat_format_of(trial) in THINKING_FORMATS and bool(message.get("metadata"))
    return str(message["metadata"] if is_rewritten else message["content"].strip())


@check(stage="rows", needs=("prompt",), incident="ChatGLM3 4568c63: training and serving rendered tools differently")
def check_row_begins_with_the_serving_prompt(trial: Trial) -> None:
    """The serving prompt of a turn equals the row up to that turn, id by id, and the turn's targets begin there."""
    for talk in bank_of(trial):
        row = row_of(trial, talk)
        answers = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
        starts = answer_starts(trial, row)
        if len(starts) != len(answers):
            raise NotApplicable(f"not judged: {len(starts)} supervised runs for {len(answers)} assistant turns")
        for number, (start, index) in enumerate(zip(starts, answers, strict=True), 1):
            if chat_format_of(trial) in THINKING_FORMATS and not carries_reasoning(talk.messages, index):
                continue  # serving asks for a turn without reasoning by another prompt
            history, tools = copy.deepcopy((list(talk.messages[:index]), list(talk.tools) if talk.tools else None))
            prompt = [int(token) for token in trial.subject.prompt(history, tools)]
            where = common_prefix_length(prompt, row.ids[:start])
            if where < max(len(prompt), start):
                problem = f"turn {number} (message {index}): serving sends {len(prompt)} ids, the row has {start}"
                sent = show_token(trial.subject.tokenizer, prompt, where) if where < len(prompt) else "nothing"
                fail(trial, row, f"{problem} before the answer; at position {where} serving sends {sent}", where)


@check(
    stage="rows",
    needs=("build_model", "train"),
    incident="nanochat 83dccc2: the renderer was right, the loader's mask was not",
)
def check_mask_reaches_the_loss(trial: Trial) -> None:
    """The ids and labels that the gradient reveals are those that ``encode`` returned, in a data set of mixed rows."""
    trial.require_plans("mask_reaches_the_loss", "rows")
