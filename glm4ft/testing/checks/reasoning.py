"""Claims about rows of models that reason: what a prompt supplies is no target, and rows are what serving renders."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from glm4ft.data.control_tokens import common_prefix_length
from glm4ft.testing.checks.encoding import as_served, bank_of, chat_format_of, fail, row_of
from glm4ft.testing.specification.mask_oracle import IGNORED, show_token
from glm4ft.testing.specification.turn_text import THINKING_FORMATS, carries_reasoning
from glm4ft.testing.trial.bank import MARKERS_TALK
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import NotApplicable
from glm4ft.testing.trial.trial import Trial


@check(stage="rows", incident="NeMo AutoModel 3738 and 3739; TRL's training template of GLM-4.5 trains them")
def check_no_empty_reasoning_is_trained(trial: Trial) -> None:
    """A block of white space in place of reasoning is no target: a model that learns to write it stops thinking."""
    _require_reasoning(trial)
    tokenizer = trial.subject.tokenizer
    opened, closed, header = (
        tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("<think>", "</think>", "<|assistant|>")
    )
    for talk in bank_of(trial):
        row = row_of(trial, talk)
        for at in _ends(row.ids, closed):
            begin = max([0, *(end for end in _ends(row.ids[: at - len(closed)], opened, header))])
            inner = tokenizer.decode(row.ids[begin : at - len(closed)])
            if not inner.strip() and row.labels[at - 1] != IGNORED:
                fail(trial, row, f"position {at - 1}: the end of an empty block of reasoning is supervised", at - 1)


def _ends(ids: Sequence[int], *texts: tuple[int, ...]) -> list[int]:
    """The positions behind every occurrence of texts, given as their ids."""
    return [at + len(text) for text in texts for at in range(len(ids)) if tuple(ids[at : at + len(text)]) == text]


@check(stage="rows", incident="LLaMA-Factory 10770: blocks of reasoning stood where the checkpoint's template has none")
def check_reasoning_is_rendered_as_serving_renders_it(trial: Trial) -> None:
    """The ids of a row are those of the checkpoint's own template, reasoning kept or emptied turn by turn as there."""
    _require_reasoning(trial)
    if chat_format_of(trial) == "glm-z1-0414":
        raise NotApplicable("the template of GLM-Z1 deletes the reasoning that is to be trained")
    if not trial.base_tokenizer.chat_template:
        raise NotApplicable("the base has no chat template")
    for talk in bank_of(trial):
        if talk.id == MARKERS_TALK.id:  # a template renders text, in which a marker becomes a control token
            continue
        row, messages = row_of(trial, talk), copy.deepcopy(list(talk.messages))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        thinks = any(carries_reasoning(messages, index) for index in answers)
        rendered = trial.base_tokenizer.apply_chat_template(
            as_served(trial, messages), tools=list(talk.tools) if talk.tools else None, return_dict=False,
            **({} if thinks else {"enable_thinking": False}),
        )  # fmt: skip
        expected = [int(token) for token in rendered]
        where = common_prefix_length(expected, row.ids)
        if where < len(expected):
            serving = show_token(trial.base_tokenizer, expected, where)
            fail(trial, row, f"position {where}: the template of the checkpoint has {serving} there", where)


def _require_reasoning(trial: Trial) -> None:
    if chat_format_of(trial) not in THINKING_FORMATS:
        raise NotApplicable(f"the claim is about {', '.join(THINKING_FORMATS)}, whose turns have reasoning")
