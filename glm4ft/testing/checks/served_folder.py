"""Checks what a server reads from a saved folder besides the weights: tokenizer, chat template and stop ids."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from glm4ft.data.control_tokens import common_prefix_length
from glm4ft.testing.checks.encoding import (
    answer_starts,
    as_served,
    bank_of,
    chat_format_of,
    controls_of,
    is_glm,
    name_of,
    row_of,
)
from glm4ft.testing.specification.mask_oracle import show_token
from glm4ft.testing.specification.turn_text import THINKING_FORMATS, carries_reasoning
from glm4ft.testing.trial.bank import MARKERS_TALK, Talk
from glm4ft.testing.trial.stages import CheckFailed
from glm4ft.testing.trial.trial import Trial

PROBE = "<|user|> and 法国 [gMASK]\n\n it's 42"


def require_trained_tokenizer(trial: Trial, folder: Path, where: str) -> None:
    """Fail unless a folder's tokenizer gives the trained ids, and its chat template the trained prompts.

    Args:
        trial: The trial of the subject that saved the folder.
        folder: The folder that a server would load.
        where: What messages call the folder, such as "beside the adapter".
    Raises:
        CheckFailed: If the tokenizer is missing or gives other ids, or if a prompt differs; the message shows the
            first one.
    """
    own = trial.subject.tokenizer
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        raise CheckFailed(f"no tokenizer was saved {where}: whoever loads the folder has to guess ids and template")
    saved = AutoTokenizer.from_pretrained(folder)
    if saved.encode(PROBE) != own.encode(PROBE):
        raise CheckFailed(f"the tokenizer saved {where} gives other ids")
    if not saved.chat_template:
        if own.chat_template:
            raise CheckFailed(f"the tokenizer saved {where} has lost its chat template")
        return
    for talk in bank_of(trial):
        if talk.id != MARKERS_TALK.id:  # a template renders text, in which a marker becomes a control token
            _require_trained_prompts(trial, saved, talk, where)


def _require_trained_prompts(trial: Trial, saved: Any, talk: Talk, where: str) -> None:
    can_think = chat_format_of(trial) in THINKING_FORMATS
    is_silent = can_think and not any(message.get("reasoning_content") for message in talk.messages)
    for number, (index, trained) in enumerate(_trained_prompts(trial, talk), start=1):
        if can_think and not (is_silent or carries_reasoning(talk.messages, index)):
            continue  # a later question has emptied its reasoning since serving asked for it
        history, tools = copy.deepcopy((list(talk.messages[:index]), list(talk.tools) if talk.tools else None))
        options = {"enable_thinking": False} if is_silent else {}
        try:
            rendered = saved.apply_chat_template(
                as_served(trial, history), tools=tools, add_generation_prompt=True, return_dict=False, **options
            )
        except TemplateError:  # a template may refuse what it cannot render
            continue
        sent, expected = list(rendered), list(trained)
        if talk.tools:
            text = saved.decode(sent)
            if lost := [tool["function"]["name"] for tool in talk.tools if tool["function"]["name"] not in text]:
                raise CheckFailed(f"the chat template saved {where} does not tell the model of its tools ({lost[0]})")
            # each checkpoint, and each pipeline made for one of them, words the declaration of tools in its own way
            sent, expected = (_from_first(controls_of(trial)["<|user|>"], ids) for ids in (sent, expected))
        if not is_glm(trial) and saved.decode(sent) == saved.decode(expected):
            continue  # an answer's first white space, sampled alone, is joined with its header's when read again
        at = common_prefix_length(sent, expected)
        if at < max(len(sent), len(expected)):
            shown = [show_token(saved, ids, at) if at < len(ids) else "nothing" for ids in (sent, expected)]
            raise CheckFailed(
                f"the chat template saved {where} renders another prompt than was trained: conversation "
                f"{name_of(talk)}, turn {number}: where the row has {shown[1]}, it has {shown[0]}"
            )


def _from_first(token: int, ids: list[int]) -> list[int]:
    return ids[ids.index(token) :] if token in ids else ids


def _trained_prompts(trial: Trial, talk: Talk) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The message index of each answer, with the ids before the answer."""
    row = row_of(trial, talk)
    answers = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
    return ((index, row.ids[:start]) for index, start in zip(answers, answer_starts(trial, row), strict=False))


def stop_ids(folder: Path) -> set[int]:
    """Ids at which a server ends generation: ``eos_token_id`` of ``generation_config.json``, else of ``config.json``.

    Source: ``transformers.GenerationConfig.from_pretrained``, and ``from_model_config`` where there is no such file.
    """
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        stated = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.exists() else None
        if stated is not None:
            return set(stated) if isinstance(stated, list) else {stated}
    return set()
