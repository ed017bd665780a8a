"""Readers for the accepted record formats, which produce plain turns with their places in the record.

This module handles spellings only: keys, role names, the places of tools and tool calls, values of loss flags. The
rules of a valid conversation are in ``conversation.py``. Data that cannot be represented is refused, not dropped.

Sources: the data format of THUDM/GLM-4 finetune_demo; the OpenAI chat fine-tuning format; ShareGPT as read by
LLaMA-Factory; TRL's prompt/completion format.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, TypeGuard, get_args

from glm4ft.data.conversation import Role
from glm4ft.data.known_keys import LOSS_KEYS, REASONING_KEYS, refuse_lost_meaning
from glm4ft.errors import Location, show

Record = Mapping[str, Any]

OBSERVATION: Role = "observation"
_CALLS = ("function_call", "tool_call")  # roles of LLaMA-Factory and ms-swift whose text is a call as JSON
_OTHERS: dict[str, Role] = {"developer": "system", "tool_call": "assistant"}
ROLES: dict[str, Role] = (
    {role: role for role in get_args(Role)}
    | _OTHERS
    | dict.fromkeys(("tool", "function", "tool_response"), OBSERVATION)
)
_FROM: dict[str, Role] = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant"}
SHAREGPT_ROLES: dict[str, Role] = ROLES | _FROM | {"function_response": OBSERVATION}
# A bool, 1 and 1.0 are one dictionary key in Python, so True and False stand for the numbers as well.
_TRUE, _FALSE = (True, "true", "yes", "on", "y", "t", "1"), (False, "false", "no", "off", "n", "f", "0", "")
LOSS_FLAGS: dict[object, bool] = dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False)
SHAPES_IN_WORDS = (
    '{"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]} '
    'or {"prompt": ..., "completion": ...}'
)


@dataclass(frozen=True)
class SourceMessage:
    """One message as read from its record, before the rules between messages are checked.

    Args:
        role: The role of the message's author.
        content: The text, verbatim; "" only for a system message that carries tools.
        place: The place of the message in its record.
        metadata: The name of the called tool; "" if the message is not a tool call.
        loss: The message's loss flag; None if the record has none.
        tools: The tools that the message carries.
        prompt: True for a message of a ``prompt``, which is context whatever its loss flag.
        reasoning: The text that the assistant thought before it answered; "" if there is none.
        continues: True for a call that one message holds together with the text or the call before it.
    """

    role: Role
    content: str
    place: Location
    metadata: str = ""
    loss: bool | None = None
    tools: tuple[dict[str, Any], ...] = ()
    prompt: bool = False
    reasoning: str = ""
    continues: bool = False


@dataclass(frozen=True)
class Draft:
    """A record as turns, with its top-level tools and its unused keys.

    Args:
        turns: The messages, in order.
        tools: The lists of tools at the top level of the record.
        unread: The keys of other accepted formats, which the reader of this record does not use.
    """

    turns: tuple[SourceMessage, ...]
    tools: tuple[tuple[dict[str, Any], ...], ...]
    unread: tuple[str, ...]


def read_record(record: Any, place: Location) -> Draft:
    """Read one record of any accepted format.

    Args:
        record: A decoded JSON value.
        place: The file and line of the record.

    Returns:
        The draft of the conversation, with at least one turn.

    Raises:
        DataError: If the format is unknown or ambiguous, or a part of the record cannot be read.
    """
    if not isinstance(record, Mapping):
        raise place.wrong("a record is not an object", record, SHAPES_IN_WORDS)
    refuse_lost_meaning(record, place)
    shape = _shape_of(record, place)
    turns = tuple(READERS[shape](record, place))
    used = set(shape) if shape == ("prompt", "completion") else {*shape, "system"}
    known = [key for keys in READERS for key in keys] + ["system"]
    unread = tuple(key for key in known if key not in used and record.get(key) not in (None, "", []))
    tools = tuple(_tools(record.get(key), place.key(key)) for key in ("tools", "functions"))  # OpenAI's older name
    return Draft(turns, tools, unread)


def strict_json(text: str) -> Any:
    """Decode JSON like ``json.loads``, but raise a ValueError for duplicate keys, NaN and Infinity."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise ValueError(f"the key {show(key)} stands twice in one object")
        keys[key] = value
    return keys


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def is_array(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value would be an array in JSON: any sequence but text and bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _shape_of(record: Record, place: Location) -> tuple[str, ...]:
    """Return the keys of the record's format: the only one that is complete, otherwise the only one partly present."""
    fits = [shape for shape in READERS if all(record.get(key) is not None for key in shape)]
    fits = fits or [shape for shape in READERS if any(key in record for key in shape)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        fix = "keep the keys of one shape, remove or rename the others"
        raise place.wrong("a record has the keys of several shapes", list(record), SHAPES_IN_WORDS, fix)
    raise place.wrong("a record has the keys of no known shape", list(record), SHAPES_IN_WORDS, "convert the record")


def _from_list(key: str, record: Record, place: Location) -> Iterator[SourceMessage]:
    """Read the list of messages below a key, with the system prompt that may stand beside it."""
    turns = list(_message_list(record.get(key), place.key(key), sharegpt=key == "conversations"))
    system, at = record.get("system"), place.key("system")
    if system is not None and system != "":
        if turns[0].role == "system":
            raise at.wrong("a record has two system prompts", system, "one", f"remove it or {turns[0].place.field}")
        yield SourceMessage("system", _content(system, at), at)
    yield from turns


def _from_prompt_completion(record: Record, place: Location) -> Iterator[SourceMessage]:
    sides: tuple[tuple[str, Role], ...] = (("prompt", "user"), ("completion", "assistant"))
    for key, role in sides:
        value, at = record.get(key), place.key(key)
        turns = _message_list(value, at) if is_array(value) else [SourceMessage(role, _content(value, at), at)]
        yield from (replace(turn, prompt=key == "prompt") for turn in turns)


READERS: dict[tuple[str, ...], Callable[[Record, Location], Iterable[SourceMessage]]] = {
    ("messages",): partial(_from_list, "messages"),
    ("conversations",): partial(_from_list, "conversations"),
    ("prompt", "completion"): _from_prompt_completion,
}


def _message_list(messages: Any, place: Location, *, sharegpt: bool = False) -> Iterator[SourceMessage]:
    if not is_array(messages) or not messages:
        state = "missing" if messages is None else "empty" if is_array(messages) else "not a list"
        raise place.wrong(f"{place.field} is {state}", messages, "a list of at least one message")
    before = ""
    for index, message in enumerate(messages):
        for turn in _message(message, place.item(index), sharegpt=sharegpt):
            # a call with a role of its own: nobody prompts a model anew between its text and its call
            goes_on = before == turn.role == "assistant" and (message.get("role") or message.get("from")) in _CALLS
            yield replace(turn, continues=turn.continues or goes_on)
            before = turn.role


def _message(message: Any, place: Location, *, sharegpt: bool) -> Iterator[SourceMessage]:
    """Read one message as one turn, or as several if it holds tool calls."""
    if not isinstance(message, Mapping):
        raise place.wrong("a message is not an object", message, "an object with role and content")
    role_key, content_key = _keys(message, place, sharegpt=sharegpt)
    role = _role(message, place.key(role_key), SHAREGPT_ROLES if sharegpt else ROLES, role_key)
    refuse_lost_meaning(message, place, used=REASONING_KEYS if role == "assistant" else ())
    reasoning = _reasoning(message, place) if role == "assistant" else ""
    loss, metadata = _loss(message, place), _metadata(message, role, place)
    tools = _tools(message.get("tools"), place.key("tools"))
    content, at = message.get(content_key), place.key(content_key)
    calls = list(_calls(message, role, place))
    if message[role_key] in _CALLS:
        calls, content = [*_json_calls(content, at), *calls], None
    if calls and metadata:
        raise place.key("metadata").wrong("a message names its tool twice", metadata, "metadata or calls, not both")
    text = _content(content, at, may_be_empty=bool(calls or tools))
    turn = [SourceMessage(role, text, place, metadata, loss, tools)] if text or not calls else []
    turn += [replace(call, loss=loss) for call in calls]
    yield replace(turn[0], reasoning=reasoning)
    yield from (replace(call, continues=True) for call in turn[1:])


def _keys(message: Record, place: Location, *, sharegpt: bool) -> tuple[str, str]:
    """Return the keys of the role and the content, which ShareGPT lists may call ``from`` and ``value``."""
    has_role, has_from = message.get("role") is not None, message.get("from") is not None
    if sharegpt and has_role and has_from:
        raise place.key("from").wrong("a message has two roles", list(message), "from/value or role/content")
    return ("role", "content") if has_role or not sharegpt else ("from", "value")


def _role(message: Record, place: Location, roles: dict[str, Role], key: str) -> Role:
    value, expected = message.get(key), f"one of {', '.join(roles)}"
    if value is None:
        raise place.wrong("a message has no role", list(message), f"{key}: {expected}", f"add the key {key}")
    if isinstance(value, str) and value in roles:
        return roles[value]
    word = value[:40].strip().lower() if isinstance(value, str) else ""
    near = [SHAREGPT_ROLES[word]] if word in SHAREGPT_ROLES else difflib.get_close_matches(word, roles, n=1)
    fix = f"did you mean {near[0]!r}?" if near else "rename the role"
    raise place.wrong("a message has an unknown role", value, expected, fix)


def _content(value: Any, place: Location, *, may_be_empty: bool = False) -> str:
    text = "".join(_parts(value, place)) if is_array(value) else value
    if text is None or text == "":
        if may_be_empty:
            return ""
        fix = "give it text, or remove the message (a call without arguments is written {})"
        raise place.wrong(f"a text is {'missing' if text is None else 'empty'}", value, "a non-empty string", fix)
    if not isinstance(text, str):
        raise place.wrong("a text is not a string", value, "a string, or a list of text parts")
    return _encodable(text, place)


def _parts(parts: Sequence[Any], place: Location) -> Iterator[str]:
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise place.item(index).wrong("a part of a text is not text", part, '{"type": "text", "text": "..."}')
        yield part["text"]


def _encodable(text: str, place: Location) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        expected, fix = "text that UTF-8 can encode", "replace it; it is left when an emoji is cut in half"
        raise place.wrong("a text holds half a character (a lone surrogate)", around, expected, fix) from None
    return text


def _loss(message: Record, place: Location) -> bool | None:
    """Read the message's loss flag, under any of its names."""
    flags = {key: flag for key in LOSS_KEYS if (flag := _flag(message.get(key), place.key(key))) is not None}
    if len(set(flags.values())) > 1:
        raise place.key(list(flags)[-1]).wrong("a message has two loss flags that disagree", flags, "one of the two")
    return next(iter(flags.values()), None)


def _reasoning(message: Record, place: Location) -> str:
    """Read what the assistant thought, under any of its names."""
    given = {key: message[key] for key in REASONING_KEYS if message.get(key) not in (None, "", [], {})}
    texts = {key: _content(value, place.key(key)) for key, value in given.items()}
    if len(set(texts.values())) > 1:
        raise place.key(list(texts)[-1]).wrong("a message has two texts of reasoning that differ", texts, "one of them")
    return next(iter(texts.values()), "")


def _flag(value: Any, place: Location) -> bool | None:
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, (str, int, float)) and word in LOSS_FLAGS:
        return LOSS_FLAGS[word]
    if value is None:  # columnar data sets fill missing values with null
        return None
    raise place.wrong("a loss flag is neither true nor false", value, "true or false (or 1 or 0)")


def _metadata(message: Record, role: Role, place: Location) -> str:
    value, at = message.get("metadata"), place.key("metadata")
    if value is None or value == "":
        return ""
    if role != "assistant":
        fix = "remove it: metadata names the tool that an assistant turn calls"
        raise at.wrong(f"metadata on a message of role {role}", value, "no metadata", fix)
    return _name(value, at)


def _name(value: Any, place: Location) -> str:
    """Read a tool's name, which must be one line: GLM-4 writes it after the header, and a newline ends it."""
    if isinstance(value, str) and value.strip() and value.splitlines() == [value]:
        return _encodable(value, place)
    raise place.wrong("this cannot be a tool's name", value, "a string of one line that is not blank")


def _calls(message: Record, role: Role, place: Location) -> Iterator[SourceMessage]:
    """Read the calls of an OpenAI message, given as ``tool_calls`` or as the older ``function_call``."""
    entries, call = message.get("tool_calls"), message.get("function_call")
    at = place.key("function_call" if entries in (None, []) else "tool_calls")
    given = call if entries in (None, []) else entries
    if given is None:
        return
    if role != "assistant":
        raise at.wrong(f"a message of role {role} calls a tool", given, "calls on assistant messages only")
    if given is call:
        yield _call(call, at)
    elif call is not None:
        raise at.wrong("a message has tool_calls and function_call", given, "one of the two")
    elif not is_array(entries):
        raise at.wrong("tool_calls is not a list", entries, "a list of calls")
    else:
        yield from (_tool_call(entry, at.item(index)) for index, entry in enumerate(entries))


def _tool_call(entry: Any, place: Location) -> SourceMessage:
    if not isinstance(entry, Mapping) or entry.get("function") is None:
        return _call(entry, place)
    if entry.get("type") not in (None, "function"):
        raise place.key("type").wrong("a call has an unknown type", entry["type"], '"function"')
    return replace(_call(entry["function"], place.key("function")), place=place)


def _call(call: Any, place: Location) -> SourceMessage:
    if not isinstance(call, Mapping):
        raise place.wrong("a call is not an object", call, "an object with name and arguments")
    arguments, at = call.get("arguments"), place.key("arguments")
    if arguments is not None and not isinstance(arguments, str):
        arguments = _dumped(arguments, at)
    return SourceMessage(
        "assistant", _content(arguments, at), place, metadata=_name(call.get("name"), place.key("name"))
    )


def _json_calls(value: Any, place: Location) -> list[SourceMessage]:
    """Read the calls in the text of a ShareGPT ``function_call`` message: one object, or a list of them."""
    decoded = _decoded(_content(value, place), place)
    if not is_array(decoded):
        return [_call(decoded, place)]
    return [_call(call, place.item(index)) for index, call in enumerate(decoded)]


def _decoded(text: str, place: Location) -> Any:
    try:
        return strict_json(text)
    except ValueError as error:
        raise place.wrong(f"a string that should hold JSON does not: {error}", text, "valid JSON") from None


def _dumped(value: Any, place: Location) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise place.wrong(f"a value cannot be written as JSON: {error}", value, "a JSON value") from None


def _tools(value: Any, place: Location) -> tuple[dict[str, Any], ...]:
    """Read a list of tools, or a JSON string that holds one; null keys are dropped, as in GLM-4's finetune.py."""
    if isinstance(value, str):
        value = _decoded(value, place) if value.strip() else None
    if value is None:
        return ()
    if not is_array(value):
        raise place.wrong("tools is not a list", value, "a list of tools, or a JSON string holding one")
    return tuple(_tool(tool, place.item(index)) for index, tool in enumerate(value))


def _tool(tool: Any, place: Location) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise place.wrong("a tool is not an object", tool, 'an object such as {"type": "function", "function": {...}}')
    plain: dict[str, Any] = _plain(tool, place)
    kind = plain.get("type", "function")
    if kind != "function":
        _name(kind, place.key("type"))  # a built-in such as {"type": "python"}: its type is its name
        return plain
    function = plain.get("function", {key: value for key, value in plain.items() if key != "type"})
    if not isinstance(function, dict):
        raise place.key("function").wrong("a function is not an object", function, "an object with a name")
    _name(function.get("name"), (place.key("function") if "function" in plain else place).key("name"))
    if "function" not in plain:
        return {"type": "function", "function": function}
    return plain if "type" in plain else {"type": "function", **plain}


def _plain(value: Any, place: Location) -> Any:
    """Copy a JSON value without its null keys; refuse values that JSON or UTF-8 cannot represent."""
    if isinstance(value, Mapping):
        given = {_key(key, place): item for key, item in value.items() if item is not None}
        return {key: _plain(item, place.key(key)) for key, item in given.items()}
    if is_array(value):
        return [_plain(item, place.item(index)) for index, item in enumerate(value)]
    _encodable(_dumped(value, place), place)
    return value


def _key(key: Any, place: Location) -> str:
    if not isinstance(key, str):
        raise place.wrong("a key is not a string", key, "a string")
    return _encodable(key, place)
