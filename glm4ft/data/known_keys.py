"""The keys of records and messages that carry meaning which training on answers alone would lose.

A key that other trainers read is honoured, or refused with the reason; nothing that carries meaning is dropped. A key
whose value is null or empty says nothing: columnar data sets fill in what is missing.

Sources: the preference formats of TRL (``chosen``, ``rejected``; KTO's ``label``) and ms-swift (``rejected_response``,
``rejected_messages``); the media keys of LLaMA-Factory and ms-swift; reasoning as OpenAI-compatible servers return it;
axolotl's ``message_field_training`` and OpenAI's ``weight``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from glm4ft.errors import Location

# Flags of a message that say whether it is trained, all with the same polarity.
LOSS_KEYS = ("loss", "weight", "train", "training", "trainable")

# Names of the text that an assistant thought before it answered. A chat format without reasoning refuses it.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

_PREFERENCE = (
    "a record holds preference data",
    "no second answer: training on the first alone is not preference training",
    "train it with a preference trainer, or remove the key to train on the conversation alone",
)
_MEDIA = (
    "a record holds media",
    "text alone: the dense GLM-4 models have no eyes or ears, and the text would refer to what is not there",
    "leave the record out, or remove the key if the text stands alone",
)
_REASONING = (
    "reasoning stands where no assistant message holds it",
    "reasoning as a text on the assistant message that it belongs to",
    "write it there as reasoning_content, or remove the key",
)
_MASK = (
    "a message has a mask",
    "loss: true or false, since trainers differ in what a mask of 1 means",
    "rename it to loss, with true where the message is trained",
)
REFUSED = {
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys((*REASONING_KEYS, "reasoning_details"), _REASONING),
    "mask": _MASK,
}


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
        if key in REFUSED and key not in used and value not in (None, "", [], {}, ()):
            problem, expected, fix = REFUSED[key]
            raise place.key(key).wrong(problem, value, expected, fix)
    label = holder.get("label")
    if isinstance(label, bool):  # of another type it is a category, which says nothing about an answer's worth
        raise place.key("label").wrong(_PREFERENCE[0], label, *_PREFERENCE[1:])
