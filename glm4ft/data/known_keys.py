"""The keys of records and messages that carry meaning which training on answers alone would lose.

A key that other trainers read is honoured, or refused with the reason; nothing that carries meaning is dropped. A key
whose value is null or empty says nothing: columnar data sets fill in what is missing.

Sources: the preference formats of TRL (``chosen``, ``rejected``; KTO's ``label``) and ms-swift (``rejected_response``,
``rejected_messages``); the media keys of LLaMA-Factory and ms-swift; reasoning as OpenAI-compatible servers return it;
axolotl's ``message_field_training`` and OpenAI's ``weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm4ft.errors import Location

# Flags of a message that say whether it is trained, all with the same polarity.
LOSS_KEYS = ("loss", "weight", "train", "training", "trainable")

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
    "a message holds reasoning",
    "none: the dense GLM-4 formats have no place for reasoning, it would be lost",
    "remove the key",
)
_MASK = (
    "a message has a mask",
    "loss: true or false, since trainers differ in what a mask of 1 means",
    "rename it to loss, with true where the message is trained",
)
REFUSED = {
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("reasoning_content", "reasoning", "reasoning_details", "thinking"), _REASONING),
    "mask": _MASK,
}


def refuse_lost_meaning(holder: Mapping[str, Any], place: Location) -> None:
    """Refuse a record or a message with a key that carries meaning for which there is no place.

    Args:
        holder: The record or the message.
        place: Its place in the file.
    Raises:
        DataError: If there is such a key, with a value that says something.
    """
    for key, value in holder.items():
        if key in REFUSED and value not in (None, "", [], {}, ()):
            problem, expected, fix = REFUSED[key]
            raise place.key(key).wrong(problem, value, expected, fix)
    label = holder.get("label")
    if isinstance(label, bool):  # of another type it is a category, which says nothing about an answer's worth
        raise place.key("label").wrong(_PREFERENCE[0], label, *_PREFERENCE[1:])
