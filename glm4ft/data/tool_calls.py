"""Tools and their calls in every place where a record may hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from glm4ft.data.conversation import Role
from glm4ft.data.json_values import decoded, dumped, is_array, listed, without_nulls
from glm4ft.data.known_keys import CALL_ID_KEYS
from glm4ft.data.source_message import SourceMessage, name_of, text_of
from glm4ft.errors import Location


def read_tools(value: Any, place: Location) -> tuple[dict[str, Any], ...]:
    """Read a list of tools, or a JSON string that holds one; null keys are dropped, as in GLM-4's finetune.py.

    Raises:
        DataError: If it is no list of tools.
    """
    if isinstance(value, str):
        value = decoded(value, place) if value.strip() else None
    if value is None:
        return ()
    if not is_array(value):
        raise place.wrong("tools is not a list", value, "a list of tools, or a JSON string holding one")
    return tuple(_tool(tool, place.item(index)) for index, tool in enumerate(value))


def read_calls(message: Mapping[str, Any], role: Role, place: Location) -> Iterator[SourceMessage]:
    """Read the calls of an OpenAI message, given as ``tool_calls`` or as the older ``function_call``.

    Raises:
        DataError: If they cannot be read, or the message is not the assistant's.
    """
    entries, call = message.get("tool_calls"), message.get("function_call")
    if entries is None and call is None:
        return
    at = place.key("function_call" if entries in (None, [], "") else "tool_calls")
    given = listed(call if entries in (None, [], "") else entries, at)
    if given is None or (given == [] and isinstance(entries, str)):
        return
    if role != "assistant":
        raise at.wrong(f"a message of role {role} calls a tool", given, "calls on assistant messages only")
    if entries in (None, [], ""):
        yield read_call(given, at)
    elif call is not None:
        raise at.wrong("a message has tool_calls and function_call", given, "one of the two")
    elif not is_array(given):
        raise at.wrong("tool_calls is not a list", given, "a list of calls")
    else:
        yield from (_entry(entry, at.item(index)) for index, entry in enumerate(given))


def calls_in_json(value: Any, place: Location) -> list[SourceMessage]:
    """Read the calls in the text of a ``function_call`` or ``tool_call`` message: one object, or a list of them.

    Raises:
        DataError: If the text is not JSON, or no call.
    """
    calls = value if isinstance(value, Mapping) else decoded(text_of(value, place), place)
    if not is_array(calls):
        return [_entry(calls, place)]
    return [_entry(call, place.item(index)) for index, call in enumerate(calls)]


def read_call(call: Any, place: Location) -> SourceMessage:
    """Read one call: an object with name and arguments.

    Raises:
        DataError: If it cannot be read.
    """
    if not isinstance(call, Mapping):
        raise place.wrong("a call is not an object", call, "an object with name and arguments")
    key = "parameters" if call.get("arguments") is None and call.get("parameters") is not None else "arguments"
    arguments, at = call.get(key), place.key(key)
    if arguments is not None and not isinstance(arguments, str):
        arguments = dumped(arguments, at)
    name = name_of(call.get("name"), place.key("name"))
    return SourceMessage(
        "assistant", text_of(arguments, at), place, metadata=name, call_id=call_id(call), is_json_call=True
    )


def call_id(holder: Mapping[str, Any]) -> str:
    """The id of a call, or of the call that a result answers; "" if there is none."""
    return next((str(holder[key]) for key in CALL_ID_KEYS if holder.get(key) not in (None, "")), "")


def _entry(entry: Any, place: Location) -> SourceMessage:
    if not isinstance(entry, Mapping) or entry.get("function") is None:
        return read_call(entry, place)
    if entry.get("type") not in (None, "function"):
        raise place.key("type").wrong("a call has an unknown type", entry["type"], '"function"')
    return replace(read_call(entry["function"], place.key("function")), place=place, call_id=call_id(entry))


def _tool(tool: Any, place: Location) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise place.wrong("a tool is not an object", tool, 'an object such as {"type": "function", "function": {...}}')
    plain: dict[str, Any] = without_nulls(tool, place)
    kind = plain.get("type", "function")
    if kind != "function":
        name_of(kind, place.key("type"))  # a built-in such as {"type": "python"}: its type is its name
        return plain
    function = plain.get("function", {key: value for key, value in plain.items() if key != "type"})
    if not isinstance(function, dict):
        raise place.key("function").wrong("a function is not an object", function, "an object with a name")
    name_of(function.get("name"), (place.key("function") if "function" in plain else place).key("name"))
    if "function" not in plain:
        return {"type": "function", "function": function}
    return plain if "type" in plain else {"type": "function", **plain}
