"""What the peers are known to fail, with the evidence and what it means for a user.

Data, not excuses: an entry whose check passes makes ``glm4ft check`` fail, so a peer that is mended turns its lane red
until the entry goes. ``docs/scoreboard.py`` prints all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class KnownFailure:
    """A check that a peer fails.

    Args:
        check: its name.
        kind: ``alternative`` is a convention that differs from the suite's and works.
        what: the peer does.
        consequence: for a user.
        remedy: the configuration that avoids it; "" if none is known.
        messages: a minimal conversation that shows it; () where it shows in any.
        tools: of that conversation.
    """

    check: str
    kind: Literal["fault", "alternative"]
    what: str
    consequence: str
    remedy: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


def reasons(failures: Sequence[KnownFailure]) -> dict[str, str]:
    """The failures as ``expected_failures`` of a subject."""
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

# Measured with transformers 5.23, and 1.16 of TRL, whose trainer is a subclass.
TRAINER_EVALUATES = (
    KnownFailure(
        check="logging_and_saving_do_not_change_the_run",
        kind="fault",
        what="the loader of an evaluation draws a seed from torch's global generator",
        consequence="with dropout, a run that evaluates is another run than one that does not",
        remedy="compare runs that evaluate at the same steps",
    ),
    KnownFailure(
        check="evaluating_and_saving_leave_the_model_unchanged",
        kind="alternative",
        what="`evaluate` leaves the model in eval mode; the next training step puts it back",
        consequence="only who trains on by a loop of their own is without dropout",
    ),
)
NO_TARGETS = KnownFailure(
    check="rows_without_targets_do_not_count",
    kind="fault",
    what="a step without any target is taken, on gradients of nothing (as in TRL 6668)",
    consequence="the log shows a loss of 0.0, and nothing says that nothing was trained",
    remedy="drop rows without targets before training",
)
TRANSFORMERS = (NO_TARGETS, *TRAINER_EVALUATES)
LLAMA_FACTORY = (
    KnownFailure(
        check="lists_have_one_length_and_labels_equal_ids_where_supervised",
        kind="alternative",
        what="trains `<|endoftext|>` as the stop of every turn; inside of a conversation it is the label over the next "
        "turn's `<|user|>` or `<|observation|>` (`efficient_eos`)",
        consequence="generation stops, since `<|endoftext|>` is a stop id of GLM-4; whoever reads the stop token to "
        "tell a tool call (`<|observation|>`) from an answer (`<|user|>`) cannot",
        messages=TWO_TURNS,
    ),
    INJECTION,
    KnownFailure(
        check="every_turn_has_learned_to_stop",
        kind="alternative",
        what="the token that stands at the end of a turn is not the one that is trained there: see above",
        consequence="as above",
    ),
    KnownFailure(
        check="every_turn_is_reproduced_and_stops",
        kind="alternative",
        what="stops with `<|endoftext|>` where the row has `<|user|>`: see above",
        consequence="as above",
    ),
)
NEWLINE = "puts the line break behind `<|assistant|>` into the prompt and does not train it"
NEWLINE_CONSEQUENCE = (
    "serving sends no line break, so the model has to sample it, or a tool's name, as its first token: the choice "
    "between answering and calling is never trained, and an adapter that has learnt its data by heart does not begin "
    "its answers"
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
        what="the untrained first token leads astray",
        consequence="greedy decoding from the serving prompt does not say the answer that was learnt",
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
            consequence="a server that renders by the template sends other prompts than were trained, once a tool was "
            "called",
            messages=(*CALL, {"role": "observation", "content": "31"}, {"role": "assistant", "content": "warm"}),
            tools=(WEATHER_TOOL,),
        )
        for check in ("tokenizer_is_saved_with_the_adapter", "merged_checkpoint_is_served_as_it_was_trained")
    ),
    KnownFailure(
        check="loss_flag_is_honoured",
        kind="fault",
        what="`loss: false` on the last message leaves its stop token supervised",
        consequence="one token of a turn that was to be left out is trained",
        remedy="cut the conversation before a last turn that is not to be trained",
        messages=(*TWO_TURNS[:3], {**TWO_TURNS[3], "loss": False}),
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
            what="as above: the row has one header more than the conversation",
            consequence="none",
            messages=TWO_TURNS[:3],
        )
        for check in ("row_begins_with_the_serving_prompt", "every_message_has_its_header")
    ),
    NO_TARGETS,
    KnownFailure(
        check="logged_learning_rate_is_the_one_applied",
        kind="fault",
        what="logs the rate of the next step: 0.0025 for an update at 0, in the first step of a warm-up",
        consequence="curves of the rate are one step ahead of the run",
    ),
    # Measured with ms-swift 4.6.0: passes with either remedy.
    KnownFailure(
        check="resumed_run_equals_the_uninterrupted_run",
        kind="fault",
        what="resumed within an epoch, a run makes its loader anew for the next one, which draws a seed from torch's "
        "global generator; the loader of the whole run lives on (`dataloader_persistent_workers`, on by default) and "
        "draws none",
        consequence="with dropout, a resumed run is another run from the next epoch on",
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
        consequence="the model learns to give the turn to the user where the tool should answer; a server that waits "
        "for `<|observation|>` waits in vain",
        remedy="only train conversations that end with an answer",
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
COMBINE = "trains the last turn only, without its first token, the line break or the first of a tool's name"
OFFICIAL_SCRIPT_COMBINED = (
    *TRANSFORMERS,
    INJECTION,
    KnownFailure(
        check="mask_is_what_the_model_must_sample",
        kind="fault",
        what=COMBINE,
        consequence="training the last turn only is what the mode is for; but the first token must be sampled at "
        "inference and is never trained",
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
        what="trains whatever follows the last `<|assistant|>`, also a user's message that nobody answered",
        consequence="the model learns to speak as the user",
        remedy="`combine: false`, or cut conversations behind their last answer",
        messages=TWO_TURNS[:3],
    ),
    KnownFailure(
        check="every_turn_ends_in_one_stop",
        kind="alternative",
        what="turns before the last are not trained, so neither are their stop tokens",
        consequence="as the mode says",
        messages=TWO_TURNS,
    ),
    KnownFailure(
        check="earlier_turns_do_not_change",
        kind="alternative",
        what="a turn is trained only as long as none follows",
        consequence="as the mode says",
        messages=TWO_TURNS,
    ),
    KnownFailure(
        check="every_turn_has_learned_to_stop",
        kind="alternative",
        what="turns before the last are not trained",
        consequence="as the mode says",
    ),
    *(
        KnownFailure(
            check=check,
            kind="fault",
            what="the untrained first token leads astray",
            consequence="greedy decoding from the serving prompt does not say the answer that was learnt",
            remedy="`combine: false`",
        )
        for check in ("every_turn_is_reproduced_and_stops", "own_inference_reproduces_every_turn")
    ),
)
# Measured with trl 1.16.0 on the built-in base: after 60 steps the loss is 0.0007 and the stop token's is 11.2 nats.
NO_STOP = (
    "trains the completion as the template renders it; GLM-4's renders the stop token of a turn, the next role's, only "
    "before a next message, so nothing ends the last answer (as in TRL 3091, and TRL 6044 for GLM-4-MoE)"
)
NO_STOP_REMEDY = (
    "prepare ids and labels yourself, with the next role's token as the last of each answer: TRL trains `input_ids` "
    "and `labels` as they are"
)
LAST_ONLY = "a completion is the last answer alone: earlier answers are prompt, and a longer conversation untrains them"
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
    KnownFailure(
        check="earlier_turns_do_not_change",
        kind="alternative",
        what=LAST_ONLY,
        consequence="as the shape of the data says: make one row of each answer to train them all",
        messages=TWO_TURNS,
    ),
)
