"""The checks that the peers are known to fail, with the evidence and the consequence for a user.

If a listed check passes, ``glm4ft check`` fails: when a peer is fixed, its CI lane is red until the entry is removed.
``docs/scoreboard.py`` prints all entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class KnownFailure:
    """A check that a peer fails.

    Args:
        check: The name of the check.
        kind: ``fault``, or ``alternative`` for a convention that differs from the suite's and works.
        what: What the peer does.
        consequence: What that means for a user.
        remedy: The configuration that avoids it; "" if none is known.
        messages: A minimal conversation that shows it; () if any conversation does.
        tools: The tools of that conversation.
    """

    check: str
    kind: Literal["fault", "alternative"]
    what: str
    consequence: str
    remedy: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


def reasons(failures: Sequence[KnownFailure]) -> dict[str, str]:
    """The failures in the form of a subject's ``expected_failures``: the reason by name of the check."""
    return {failure.check: f"{failure.kind}, {failure.what}" for failure in failures}


MARKERS = (
    {"role": "user", "content": "what does <|assistant|> mean?"},
    {"role": "assistant", "content": "it begins an answer"},
)
TWO_TURNS = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
)
WEATHER_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "", "parameters": {"type": "object", "properties": {}}},
}
CALL = (
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "metadata": "get_weather", "content": '{"city": "Paris", "now": true}'},
)
INJECTION = KnownFailure(
    check="content_never_becomes_a_control_token",
    kind="fault",
    what="encodes rendered text in one piece, so marker text in a message becomes control tokens",
    consequence="a user who types `<|assistant|>` writes the assistant's turn; text about chat templates is trained as "
    "if it were turns",
    remedy="none known: filter the markers out of the data",
    messages=MARKERS,
)

# Measured with transformers 5.23, and with TRL 1.16, whose trainer is a subclass of transformers'.
TRAINER_EVALUATES = (
    KnownFailure(
        check="logging_and_saving_do_not_change_the_run",
        kind="fault",
        what="the loader of an evaluation draws a seed from torch's global generator",
        consequence="with dropout, a run that evaluates differs from one that does not",
        remedy="compare runs that evaluate at the same steps",
    ),
    KnownFailure(
        check="evaluating_and_saving_leave_the_model_unchanged",
        kind="alternative",
        what="`evaluate` leaves the model in eval mode; the next training step restores training mode",
        consequence="dropout stays off only for users who continue training with a loop of their own",
    ),
)
NO_TARGETS = KnownFailure(
    check="rows_without_targets_do_not_count",
    kind="fault",
    what="takes a step even if its rows have no target at all (as in TRL 6668)",
    consequence="the log shows a loss of 0.0, and no message reports that nothing was trained",
    remedy="drop rows without targets before training",
)
TRANSFORMERS = (NO_TARGETS, *TRAINER_EVALUATES)
LLAMA_FACTORY = (
    KnownFailure(
        check="lists_have_one_length_and_labels_equal_ids_where_supervised",
        kind="alternative",
        what="trains `<|endoftext|>` as the stop of every turn; inside of a conversation it is the label over the next "
        "turn's `<|user|>` or `<|observation|>` (`efficient_eos`)",
        consequence="generation stops, since `<|endoftext|>` is a stop id of GLM-4; but the stop token does not "
        "distinguish a tool call (`<|observation|>`) from an answer (`<|user|>`)",
        messages=TWO_TURNS,
    ),
    INJECTION,
    KnownFailure(
        check="every_turn_has_learned_to_stop",
        kind="alternative",
        what="the token at the end of a turn is not the one that is trained there: see above",
        consequence="as above",
    ),
    KnownFailure(
        check="every_turn_is_reproduced_and_stops",
        kind="alternative",
        what="stops with `<|endoftext|>` where the row has `<|user|>`: see above",
        consequence="as above",
    ),
)
NEWLINE = "puts the line break after `<|assistant|>` into the prompt and does not train it"
NEWLINE_CONSEQUENCE = (
    "serving sends no line break, so the first token that the model must sample is a line break or a tool's name: the "
    "choice between answering and calling is never trained, and an adapter that has learnt its data by heart does not "
    "begin its answers"
)
MS_SWIFT = (
    KnownFailure(
        check="mask_is_what_the_model_must_sample",
        kind="fault",
        what=NEWLINE,
        consequence=NEWLINE_CONSEQUENCE,
        messages=TWO_TURNS[:2],
    ),
    KnownFailure(
        check="supervised_text_is_the_answer",
        kind="fault",
        what=NEWLINE,
        consequence="as above",
        messages=TWO_TURNS[:2],
    ),
    KnownFailure(
        check="every_turn_is_reproduced_and_stops",
        kind="fault",
        what="goes wrong at the first token of an answer, which is never trained",
        consequence="greedy decoding from the serving prompt does not generate the learnt answer",
    ),
    INJECTION,
    KnownFailure(
        check="every_message_is_in_the_row",
        kind="fault",
        what="writes the arguments of a tool call as a Python dictionary, not as JSON",
        consequence="the model learns calls such as `{'city': 'Paris', 'now': True}`, which no JSON parser reads",
        remedy="none known: call turns as plain assistant text, `get_weather\\n{...}`, keep their JSON but end like "
        "answers",
        messages=CALL,
        tools=(WEATHER_TOOL,),
    ),
    *(
        KnownFailure(
            check=check,
            kind="fault",
            what="as above: the saved chat template writes a tool call's arguments as JSON",
            consequence="once a tool was called, a server that renders by the template sends prompts that were not "
            "trained",
            messages=(*CALL, {"role": "observation", "content": "31"}, {"role": "assistant", "content": "warm"}),
            tools=(WEATHER_TOOL,),
        )
        for check in ("tokenizer_is_saved_with_the_adapter", "merged_checkpoint_is_served_as_it_was_trained")
    ),
    KnownFailure(
        check="loss_flag_is_honoured",
        kind="fault",
        what="`loss: false` on the last message leaves its stop token supervised",
        consequence="one token of a turn that should not be trained is trained",
        remedy="cut the conversation before a last turn that should not be trained",
        messages=(*TWO_TURNS[:3], {**TWO_TURNS[3], "loss": False}),
    ),
    KnownFailure(
        check="loss_flag_means_the_same_in_every_spelling",
        kind="fault",
        what='takes `"loss": "false"`, a text, for true',
        consequence="a turn that should not be trained is trained",
        remedy="write the flag as a JSON boolean",
        messages=({**TWO_TURNS[0]}, {**TWO_TURNS[1], "loss": "false"}),
    ),
    KnownFailure(
        check="every_turn_ends_in_one_stop",
        kind="alternative",
        what="appends a generation prompt to a conversation that ends with the user, also in training",
        consequence="none: the appended tokens are not trained",
        messages=TWO_TURNS[:3],
    ),
    *(
        KnownFailure(
            check=check,
            kind="alternative",
            what="as above: the row has one more header than the conversation",
            consequence="none",
            messages=TWO_TURNS[:3],
        )
        for check in ("row_begins_with_the_serving_prompt", "every_message_has_its_header")
    ),
    NO_TARGETS,
    KnownFailure(
        check="logged_learning_rate_is_the_one_applied",
        kind="fault",
        what="logs the learning rate of the next step: 0.0025 instead of 0 in the first step of a warm-up",
        consequence="the logged learning-rate curve is one step ahead of the run",
    ),
    # Measured with ms-swift 4.6.0: passes with either remedy.
    KnownFailure(
        check="resumed_run_equals_the_uninterrupted_run",
        kind="fault",
        what="a run resumed within an epoch creates a new data loader for the next epoch, which draws a seed from "
        "torch's global generator; an uninterrupted run keeps its loader (`dataloader_persistent_workers`, on by "
        "default) and draws none",
        consequence="with dropout, a resumed run differs from the uninterrupted one from the next epoch on",
        remedy="`dataloader_persistent_workers: false` or `dataloader_num_workers: 0`",
    ),
)
OFFICIAL_SCRIPT = (
    *TRANSFORMERS,
    INJECTION,
    KnownFailure(
        check="every_turn_ends_in_one_stop",
        kind="fault",
        what="ends a conversation with `<|user|>`, also one that ends with a tool call",
        consequence="after a tool call the model learns to stop for the user, not for the tool; a server that waits "
        "for `<|observation|>` never receives it",
        remedy="train only conversations that end with an answer",
        messages=CALL,
        tools=(WEATHER_TOOL,),
    ),
    KnownFailure(
        check="supervised_text_is_the_answer",
        kind="fault",
        what="as above: the stop token of a last tool call",
        consequence="as above",
        messages=CALL,
        tools=(WEATHER_TOOL,),
    ),
)
OFFICIAL_TRAINER = OFFICIAL_SCRIPT
COMBINE = "trains the last turn only, without its first token, the line break or the first of a tool's name"
OFFICIAL_SCRIPT_COMBINED = (
    *TRANSFORMERS,
    INJECTION,
    KnownFailure(
        check="mask_is_what_the_model_must_sample",
        kind="fault",
        what=COMBINE,
        consequence="the mode is meant to train only the last turn; but its first token must be sampled at inference "
        "and is never trained",
        remedy="`combine: false`",
        messages=TWO_TURNS,
    ),
    KnownFailure(
        check="supervised_text_is_the_answer",
        kind="fault",
        what=COMBINE,
        consequence="as above",
        remedy="`combine: false`",
        messages=TWO_TURNS[:2],
    ),
    KnownFailure(
        check="conversation_without_targets_is_not_trained",
        kind="fault",
        what="trains everything after the last `<|assistant|>`, including a user message without an answer",
        consequence="the model learns to speak as the user",
        remedy="`combine: false`, or cut conversations after their last answer",
        messages=TWO_TURNS[:3],
    ),
    KnownFailure(
        check="every_turn_ends_in_one_stop",
        kind="alternative",
        what="turns before the last are not trained, so neither are their stop tokens",
        consequence="as intended by the mode",
        messages=TWO_TURNS,
    ),
    KnownFailure(
        check="earlier_turns_do_not_change",
        kind="alternative",
        what="a turn is trained only if it is the last one",
        consequence="as intended by the mode",
        messages=TWO_TURNS,
    ),
    KnownFailure(
        check="every_turn_has_learned_to_stop",
        kind="alternative",
        what="turns before the last are not trained",
        consequence="as intended by the mode",
    ),
    *(
        KnownFailure(
            check=check,
            kind="fault",
            what="goes wrong at the first token of an answer, which is never trained",
            consequence="greedy decoding from the serving prompt does not generate the learnt answer",
            remedy="`combine: false`",
        )
        for check in ("every_turn_is_reproduced_and_stops", "own_inference_reproduces_every_turn")
    ),
)
# Measured with trl 1.16.0 on the built-in base: after 60 steps the loss is 0.0007 and the stop token's is 11.2 nats.
NO_STOP = (
    "trains the completion as the template renders it; GLM-4's template renders a turn's stop token (the next role's) "
    "only before another message, so the last answer has none (as in TRL 3091, and TRL 6044 for GLM-4-MoE)"
)
NO_STOP_REMEDY = (
    "prepare ids and labels yourself, with the next role's token as the last of each answer: TRL trains `input_ids` "
    "and `labels` as they are"
)
LAST_ONLY = "only the last answer is the completion: earlier answers belong to the prompt and are not trained"
LAST_ONLY_ROWS = KnownFailure(
    check="earlier_turns_do_not_change",
    kind="alternative",
    what=LAST_ONLY,
    consequence="as intended by this data format: make one row per answer to train all answers",
    messages=TWO_TURNS,
)
TRL = (
    INJECTION,
    *(
        KnownFailure(
            check=check,
            kind="fault",
            what=NO_STOP,
            consequence="the model does not learn to stop: the loss is near zero and generation goes on",
            remedy=NO_STOP_REMEDY,
            messages=TWO_TURNS[:2],
        )
        for check in (
            "mask_is_what_the_model_must_sample",
            "every_turn_ends_in_one_stop",
            "supervised_text_is_the_answer",
            "every_turn_has_learned_to_stop",
            "every_turn_is_reproduced_and_stops",
            "own_inference_reproduces_every_turn",
        )
    ),
    *TRAINER_EVALUATES,
    LAST_ONLY_ROWS,
)
# On a base whose template ends every answer with a token of its own, as ChatML's does
TRL_TEMPLATE = (
    INJECTION,
    *(
        KnownFailure(
            check=check,
            kind="fault",
            what="encodes prompt and completion in one piece, so an answer that begins with white space is joined with "
            "the line end of its prompt; TRL warns of it",
            consequence="such an answer begins with a token that the serving prompt has begun already",
            remedy="answers without white space at their beginning",
            messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\nhello"}),
        )
        for check in (
            "row_begins_with_the_serving_prompt",
            "tokenizer_is_saved_with_the_adapter",
            "merged_checkpoint_is_served_as_it_was_trained",
        )
    ),
    *TRAINER_EVALUATES,
    LAST_ONLY_ROWS,
    *(
        replace(LAST_ONLY_ROWS, check=check, messages=())
        for check in (
            "mask_is_what_the_model_must_sample",
            "every_turn_has_learned_to_stop",
            "every_turn_is_reproduced_and_stops",
            "own_inference_reproduces_every_turn",
        )
    ),
)
