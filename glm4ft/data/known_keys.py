"""The table of known keys: used, or refused with the reason; all others are reported once, with their number.

A key that other trainers read is honoured, or refused with the reason; nothing that carries meaning is dropped. A key
whose value is null or empty says nothing: columnar data sets fill in what is missing.

Sources: the preference formats of TRL (``chosen``, ``rejected``; KTO's ``label``; stepwise ``completions``), of
LLaMA-Factory (``kto_tag``) and ms-swift (``rejected_response``, ``rejected_messages``); the media keys of LLaMA-Factory
and ms-swift; reasoning as OpenAI-compatible servers and Anthropic's API return it; axolotl's
``message_field_training`` and ``message_field_training_detail``, ms-swift's ``loss_scale``, OpenAI's ``weight``.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

from glm4ft.data.json_values import says_nothing
from glm4ft.errors import DataError, Location

# Flags of a message that say whether it is trained, all with the same polarity.
LOSS_KEYS = ("loss", "weight", "train", "training", "trainable", "supervised")
# Names of the text that an assistant thought before it answered. A chat format without reasoning refuses it.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
SYSTEM_KEYS = ("system", "system_prompt", "system_message", "instructions")
TOOL_KEYS = ("tools", "functions")  # the second is OpenAI's older name
RESULT_ID_KEYS = ("tool_call_id", "call_id")  # the id of a message is its own, not that of a call
CALL_ID_KEYS = (*RESULT_ID_KEYS, "id")
_CALLS = ("metadata", "tools", "tool_calls", "function_call")
_STATE = ("type", "status")  # of the items of OpenAI's Responses; they say nothing of their own
USED_IN_MESSAGE = frozenset((*ROLE_KEYS, *CONTENT_KEYS, *REASONING_KEYS, *LOSS_KEYS, *CALL_ID_KEYS, *_CALLS, *_STATE))
USED_ABOUT_TOOLS = USED_IN_MESSAGE | {"name", "arguments", "parameters", "observation", "output"}
# The shapes of records: the keys that each needs, mapped to those that it may have.
RECORD_SHAPES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("messages",): (),
    ("conversations",): (),
    ("conversation",): (),
    ("prompt", "completion"): ("history",),
    ("prompt", "response"): ("history",),
    ("query", "response"): ("history",),
    ("instruction", "output"): ("input", "history"),
    ("input", "output"): ("history",),
}
SHAPE_KEYS = frozenset(key for keys, optional in RECORD_SHAPES.items() for key in (*keys, *optional))
USED_IN_RECORD = frozenset((*SYSTEM_KEYS, *TOOL_KEYS))  # beside the keys of its shape


class Refusal(NamedTuple):
    """Why a key is refused: what it means, what would be accepted, and the way out."""

    problem: str
    expected: str
    fix: str


PREFERENCE = Refusal(
    "a record holds preference data",
    "no second answer and no judgement: training on the first answer alone is not preference training",
    "train it with a preference trainer (DPO, KTO), or remove the key to train on the conversation alone",
)
MEDIA = Refusal(
    "a record holds media",
    "text alone: the dense GLM-4 models have no eyes or ears, and the text would refer to what is not there",
    "leave the record out, or remove the key if the text stands alone",
)
REASONING = Refusal(
    "reasoning stands where no assistant message holds it",
    "reasoning as a text on the assistant message that it belongs to",
    "write it there as reasoning_content, or remove the key",
)
_MASK = Refusal(
    "a message has a mask",
    "loss: true or false, since trainers differ in what a mask of 1 means",
    "rename it to loss, with true where the message is trained",
)
_PARTS = Refusal(
    "a message is to be trained in parts or with a factor",
    "loss: true or false, since every token of an answer counts the same here",
    "give the message a loss of true or false",
)
_REFUSAL = Refusal(
    "a message holds a refusal beside its content",
    "the text of the answer as its content",
    "move the refusal into the content to train it, or remove the key",
)
_DOCUMENTS = Refusal(
    "a record holds documents, which a template would put into the prompt",
    "none: GLM-4's templates have no place for them, they would be lost",
    "write them into the system message or the question",
)
_FLAG = Refusal(
    "a record has a training flag of its own",
    "flags on its messages: loss, true or false; rows weigh as much as they have targets",
    "put loss on the messages, or leave the record out; a whole file gets a weight by --data file.jsonl=0.5",
)
REFUSED = {
    **dict.fromkeys(("chosen", "rejected", "chosen_response", "rejected_response", "chosen_messages"), PREFERENCE),
    **dict.fromkeys(("rejected_messages", "positive_messages", "negative_messages", "kto_tag"), PREFERENCE),
    **dict.fromkeys(("image", "images", "image_url", "image_urls", "image_path", "image_paths"), MEDIA),
    **dict.fromkeys(("video", "videos", "video_url", "video_path", "audio", "audios", "audio_url"), MEDIA),
    **dict.fromkeys(("audio_path",), MEDIA),
    **dict.fromkeys((*REASONING_KEYS, "reasoning_details", "reasoning_text"), REASONING),
    **dict.fromkeys(("thinking_blocks", "thought", "thoughts", "cot", "chain_of_thought"), REASONING),
    **dict.fromkeys(("mask", "masked", "loss_mask"), _MASK),
    **dict.fromkeys(("train_detail", "training_detail", "loss_scale"), _PARTS),
    "refusal": _REFUSAL,
    "documents": _DOCUMENTS,
}


def refused(refusal: Refusal, value: Any, place: Location) -> DataError:
    """The error of a key or part that is refused, to be raised by the caller."""
    return place.wrong(refusal.problem, value, refusal.expected, refusal.fix)


def refuse_lost_meaning(holder: Mapping[str, Any], place: Location, *, used: Container[str] = ()) -> None:
    """Refuse a record or a message with a key that carries meaning for which there is no place.

    Args:
        holder: The record or the message.
        place: Its place in the file.
        used: The keys for which there is a place here.
    Raises:
        DataError: If there is such a key, with a value that says something.
    """
    for key, value in holder.items():
        if key in REFUSED and key not in used and not says_nothing(value):
            raise refused(REFUSED[key], value, place.key(key))
    label = holder.get("label")
    if isinstance(label, bool):  # of another type it is a category, which says nothing about an answer's worth
        raise refused(PREFERENCE, label, place.key("label"))


def refuse_flag_of_record(record: Mapping[str, Any], place: Location) -> None:
    """Refuse a record that is not to be trained, or with a factor of its own; flags that are on say nothing.

    Raises:
        DataError: If there is such a flag.
    """
    for key in LOSS_KEYS:
        value = record.get(key)
        is_number = isinstance(value, (bool, int, float)) and value != 1
        if is_number or (isinstance(value, str) and value.strip().lower() in ("false", "no", "off", "0")):
            raise refused(_FLAG, value, place.key(key))


def unknown_keys(holder: Mapping[str, Any], used: frozenset[str] | set[str]) -> Iterator[str]:
    """The keys of a record or a message that are neither used nor refused, and whose value says something."""
    for key, value in holder.items():
        if key not in used and not says_nothing(value):
            yield str(key)
