"""The checks that rows of the peers are known to fail in GLM-4.5's format, with the evidence and the consequence."""

from __future__ import annotations

from dataclasses import replace

from glm4ft.testing.subjects.known_failures import (
    INJECTION,
    LLAMA_FACTORY,
    MS_SWIFT,
    TWO_TURNS,
    KnownFailure,
)

THOUGHT_TWICE = (
    {"role": "user", "content": "which river?"},
    {"role": "assistant", "content": "the Rhine", "reasoning_content": "there are many"},
    {"role": "user", "content": "how long?"},
    {"role": "assistant", "content": "long", "reasoning_content": "I know it"},
)


def _no_switch(rest: str, remedy: str) -> KnownFailure:
    return KnownFailure(
        check="reasoning_is_rendered_as_serving_renders_it",
        kind="fault",
        what="rows without reasoning lack the `/nothink` that serving writes behind the user's text if the model shall "
        f"not think{rest}",
        consequence="the model learns not to think where it was asked to, and never sees the prompt that asks for that",
        remedy=remedy,
        messages=TWO_TURNS[:2],
    )


def _earlier_reasoning(remedy: str) -> KnownFailure:
    return KnownFailure(
        check="row_begins_with_the_serving_prompt",
        kind="fault",
        what="keeps the reasoning of earlier turns, which the checkpoint's template empties (LLaMA-Factory 10770) and "
        "which its own inference empties or removes",
        consequence="later answers are trained behind prompts that no server sends",
        remedy=remedy,
        messages=THOUGHT_TWICE,
    )


# Measured with TRL 1.16, as in NeMo AutoModel 3738.
EMPTY_BLOCK = "trains the empty block that stands in place of reasoning, which serving sends"
TRL_REASONING = (
    *(
        KnownFailure(
            check=check,
            kind="fault",
            what=EMPTY_BLOCK,
            consequence="the model learns to write `<think></think>` where it was asked to think; in a conversation of "
            "several questions, every turn but the last trains that",
            remedy="split conversations so that each ends with the only turn that is trained, and leave out those "
            "without reasoning",
            messages=TWO_TURNS[:2],
        )
        for check in (
            "no_empty_reasoning_is_trained",
            "mask_is_what_the_model_must_sample",
            "supervised_text_is_the_answer",
        )
    ),
    _no_switch("", 'a column `chat_template_kwargs` with `{"enable_thinking": false}` in those rows'),
    INJECTION,
)

# Measured with LLaMA-Factory 0.9.5.
_BLANK_BLOCK = (
    "a turn without reasoning begins with `<think>\\n\\n</think>\\n\\n`, in front of the line break that follows the "
    "header, and trains it; the checkpoint's template writes `\\n<think></think>`, and serving sends it"
)
LLAMA_FACTORY_REASONING = (
    *(
        KnownFailure(
            check=check,
            kind="fault",
            what=_BLANK_BLOCK,
            consequence="the model learns to open an empty block where it was asked to think, in ids that no server "
            "sends",
            remedy="`enable_thinking: null` leaves the block out of the loss; its ids stay",
            messages=TWO_TURNS[:2],
        )
        for check in ("no_empty_reasoning_is_trained", "supervised_text_is_the_answer")
    ),
    _no_switch(", and have a block of their own wording", "none known"),
    _earlier_reasoning("`mask_history: true`, which trains the last turn alone and removes the reasoning before it"),
    *LLAMA_FACTORY[:2],
)

# Measured with ms-swift 4.6.0; what else it does in rows is what it does in those of dense GLM-4.
_ALSO_DENSE = (
    "mask_is_what_the_model_must_sample",
    "supervised_text_is_the_answer",
    "content_never_becomes_a_control_token",
    "loss_flag_is_honoured",
    "loss_flag_means_the_same_in_every_spelling",
    "every_turn_ends_in_one_stop",
    "every_message_has_its_header",
)
MS_SWIFT_REASONING = (
    _no_switch("", "write `/nothink` behind the user's text in the data"),
    _earlier_reasoning(
        "`loss_scale: last_round`, which trains the last turn alone and empties the reasoning before it"
    ),
    *(failure for failure in MS_SWIFT if failure.check in _ALSO_DENSE),
)

# Measured with renderers 0.1.12.
RENDERERS_REASONING = (
    *(
        replace(
            failure, remedy="leave out conversations without reasoning; `enable_thinking=False` trains the block, too"
        )
        for failure in TRL_REASONING[:3]
    ),
    _no_switch("", "a second renderer with `enable_thinking=False` for those conversations"),
    replace(INJECTION, what="encodes a message's text with control tokens recognised, so marker text becomes them"),
)

# Measured with NeMo AutoModel 0.7.0, with `mask_generation_prompt`; without it, headers are trained as well.
NEMO_AUTOMODEL_REASONING = (
    *(replace(failure, remedy="leave out conversations without reasoning") for failure in TRL_REASONING[:3]),
    _no_switch("", "write `/nothink` behind the user's text in the data"),
    KnownFailure(
        check="every_turn_ends_in_one_stop",
        kind="fault",
        what="the last turn has no terminator, and in earlier ones the next role's token is not trained",
        consequence="the model never learns to stop",
        remedy="none known",
        messages=TWO_TURNS[:2],
    ),
    replace(INJECTION),
)
