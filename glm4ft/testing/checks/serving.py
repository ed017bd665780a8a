"""Claims about the pipeline's own inference: it sends the trained prompts whole, and goes on from them greedily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from glm4ft.data.control_tokens import common_prefix_length
from glm4ft.model.generation import greedy
from glm4ft.testing.checks.encoding import chat_format_of
from glm4ft.testing.checks.outcome import NEEDS, asked_turns, ended_turns, require_said
from glm4ft.testing.recording.record import record
from glm4ft.testing.recording.trace import Forward
from glm4ft.testing.specification.turn_text import THINKING_FORMATS, carries_reasoning
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

NEW_TOKENS = 8  # few enough to be quick, enough for a penalty or sampling to show


@check(
    stage="outcome",
    needs=(*NEEDS, "generate"),
    incident="axolotl 2019: no header in the prompt; open-r1 462: two prefixes",
)
def check_own_inference_reproduces_every_turn(trial: Trial) -> None:
    """The subject's own inference code uses the trained prompt and generates each answer and its stop token.

    If the model can think, of the turns that serving asks for by default: those with reasoning.
    """
    can_think = chat_format_of(trial) in THINKING_FORMATS
    for conversation, (ids, _) in zip(trial.demo, trial.rows(trial.demo), strict=True):
        for turn in ended_turns(trial, conversation, ids):
            if can_think and not carries_reasoning(conversation["messages"], turn.message):
                continue
            expected = list(ids[turn.start : turn.end + 1])
            sent, got = _generate(trial, conversation, turn.message, len(expected) + 16)
            _require_prompt(trial, sent, list(ids[: turn.start]))
            require_said(trial, got, expected)


@check(
    stage="outcome",
    needs=(*NEEDS, "generate"),
    incident="transformers 23723: the limit counted the prompt; GLM-4 finetune.py",
)
def check_own_inference_keeps_the_prompt_and_the_length_limit(trial: Trial) -> None:
    """Short and long prompts reach the model whole and are continued greedily, within the limit of new tokens."""
    model = trial.overfit.model.eval()
    for words in ("hi", "why is it so? " * 60 + "now"):
        talk = _asked(trial, words)
        ((ids, _),) = trial.rows([talk])
        prompt = list(ids[: asked_turns(trial, talk, ids)[0].start])
        sent, got = _generate(trial, talk, 1, NEW_TOKENS)
        _require_prompt(trial, sent, prompt)
        if not 1 <= len(got) <= NEW_TOKENS:
            found = f"{len(got)} new tokens for a prompt of {len(prompt)} ids"
            raise CheckFailed(f"{found}, where at most {NEW_TOKENS} were asked for")
        likeliest = greedy(model, prompt, trial.stop_ids or list(ids[-1:]), NEW_TOKENS)
        if got != likeliest:
            said, meant = (trial.subject.tokenizer.decode(tokens) for tokens in (got, likeliest))
            raise CheckFailed(
                f"inference generates {said!r} where the likeliest tokens are {meant!r}: it is not greedy"
            )


@check(
    stage="outcome",
    needs=(*NEEDS, "evaluate"),
    incident="GLM-4 finetune.py: the answer in the prompt, the question cut",
)
def check_evaluation_generates_from_the_serving_prompt(trial: Trial) -> None:
    """If evaluation generates, its prompt is the trained one: without the answer, and with the whole question."""
    words = "why is it so? " * 60 + "now"
    long = _asked(trial, words)
    talks = [*trial.demo, long]
    rows = zip(talks, trial.rows(talks), strict=True)
    prompts = [list(ids[: turn.start]) for talk, (ids, _) in rows for turn in asked_turns(trial, talk, ids)]
    with record(trial.overfit.model, 1) as trace:
        trial.subject.evaluate(trial.overfit.model, talks)
    sent = list(_continued([forward for _, forward in trace.evaluations]))
    if not sent:
        raise NotApplicable("evaluate generates nothing")
    for ids in sent:
        if ids not in prompts:
            _require_prompt(trial, ids, max(prompts, key=lambda prompt: common_prefix_length(prompt, ids)))


def _asked(trial: Trial, words: str) -> dict[str, Any]:
    """A conversation with a question, and an answer as serving asks for it by default."""
    answer = {"role": "assistant", "content": "sentinel"}
    if chat_format_of(trial) in THINKING_FORMATS:
        answer["reasoning_content"] = "sentinel"
    return {"messages": [{"role": "user", "content": words}, answer]}


def _generate(trial: Trial, talk: Mapping[str, Any], index: int, limit: int) -> tuple[list[int], list[int]]:
    """Ids that the model received, and new ids that the subject's ``generate`` returned."""
    model = trial.overfit.model
    with record(model, 1) as trace:
        got = trial.subject.generate(model, list(talk["messages"][:index]), talk.get("tools"), limit)
    sent = trace.evaluations[0][1].input_ids_BT[0].tolist() if trace.evaluations else []
    return sent, [int(token) for token in got]


def _continued(passes: Sequence[Forward]) -> Iterator[list[int]]:
    """The sequences from which generation started, without their padding.

    After such a forward pass, the next one has one token a sequence (with a cache) or the same sequences and one token.

    Raises:
        CheckFailed: If a sequence is padded on the right, where its continuation begins.
    """
    is_going_on = False
    for now, following in pairwise(passes):
        now_BT, next_BT = now.input_ids_BT, following.input_ids_BT
        is_cached = next_BT.shape[1] == 1 < now_BT.shape[1]
        goes_on = len(now_BT) == len(next_BT) and (
            next_BT.shape[1] == 1 or (next_BT.shape[1] == now_BT.shape[1] + 1 and torch.equal(next_BT[:, :-1], now_BT))
        )
        if goes_on and not is_going_on and now_BT.shape[1] > 1:
            mask = now.attention_mask
            own_BT = mask.bool() if mask is not None and mask.shape == now_BT.shape else torch.ones_like(now_BT).bool()
            if not own_BT[:, -1].all():
                how = "with a cache" if is_cached else "without a cache"
                raise CheckFailed(f"prompts of a batch are padded on the right ({how}): they go on behind padding")
            yield from (ids[keep].tolist() for ids, keep in zip(now_BT, own_BT, strict=True))
        is_going_on = goes_on


def _require_prompt(trial: Trial, sent: list[int], expected: list[int]) -> None:
    if sent != expected:
        at = common_prefix_length(sent, expected)
        decode = trial.subject.tokenizer.decode
        what = f"the prompt of inference has {len(sent)} ids, the trained one {len(expected)}"
        if at == len(expected):
            raise CheckFailed(f"{what}; where the answer should begin it goes on with {decode(sent[at : at + 6])!r}")
        raise CheckFailed(
            f"{what}; from position {at} on it is {decode(sent[at : at + 6])!r}, not {decode(expected[at : at + 6])!r}"
        )
