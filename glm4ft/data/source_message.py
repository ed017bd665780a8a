"""A message as its record spells it, and how its text is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm4ft.data.conversation import Role
from glm4ft.data.json_values import encodable, is_array
from glm4ft.data.known_keys import MEDIA, REASONING, refused
from glm4ft.errors import DataError, Location

_TEXT_PARTS = ("text", "input_text", "output_text")  # the last two of OpenAI's Responses
_MEDIA_PARTS = ("image", "video", "audio", "input_image", "input_audio", "input_file")
_REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning", "reasoning_text", "summary_text")


@dataclass(frozen=True)
class SourceMessage:
    """One message as read from its record, before the rules between messages are checked.

    Args:
        role: The role of the message's author.
        content: The text, verbatim; "" only for a system message that carries tools, and for an empty tool result.
        place: The place of the message in its record.
        metadata: The name of the called tool; "" if the message is not a tool call.
        loss: The message's loss flag; None if the record has none.
        tools: The tools that the message carries.
        prompt: True for a message of a ``prompt``, which is context whatever its loss flag.
        call_id: The id of the call, or of the call that a result answers; "" if the record has none.
        answers: The name of the tool whose result this is; "" if the record does not say.
        is_json_call: True for a call whose arguments are JSON by the record's format.
        reasoning: The text that the assistant thought before it answered; "" if there is none.
        continues: True for a call that one generation wrote together with the text or the call before it.
    """

    role: Role
    content: str
    place: Location
    metadata: str = ""
    loss: bool | None = None
    tools: tuple[dict[str, Any], ...] = ()
    prompt: bool = False
    call_id: str = ""
    answers: str = ""
    is_json_call: bool = False
    reasoning: str = ""
    continues: bool = False


def text_of(value: Any, place: Location, *, may_be_empty: bool = False) -> str:
    """Read a text: a string, or a list of text parts.

    Args:
        value: The value in the record.
        place: Its place.
        may_be_empty: Whether the text may be missing or empty.
    Raises:
        DataError: If it is no text, or not to be empty.
    """
    text = "".join(_parts(value, place)) if is_array(value) else value
    if text is None or text == "":
        if may_be_empty:
            return ""
        fix = "give it text, or remove the message (a call without arguments is written {})"
        raise place.wrong(f"a text is {'missing' if text is None else 'empty'}", value, "a non-empty string", fix)
    if not isinstance(text, str):
        raise place.wrong("a text is not a string", value, "a string, or a list of text parts")
    return encodable(text, place)


def name_of(value: Any, place: Location) -> str:
    """Read a tool's name, which must be one line: GLM-4 writes it after the header, and a newline ends it.

    Raises:
        DataError: If it is not.
    """
    if isinstance(value, str) and value.strip() and value.splitlines() == [value]:
        return encodable(value, place)
    raise place.wrong("this cannot be a tool's name", value, "a string of one line that is not blank")


def _parts(parts: Sequence[Any], place: Location) -> Iterator[str]:
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise _no_text(part, str(kind), place.item(index))
        yield part["text"]


def _no_text(part: Any, kind: str, place: Location) -> DataError:
    if kind.startswith(_MEDIA_PARTS):
        return place.wrong("a part of a text is not text: it is media", part, MEDIA.expected, "leave the record out")
    if kind in _REASONING_PARTS:
        return refused(REASONING, part, place)
    return place.wrong("a part of a text is not text", part, '{"type": "text", "text": "..."}')
