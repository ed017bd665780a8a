"""JSON values: strict decoding, and what makes a value safe to render and to encode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

from glm4ft.errors import Location, show


def is_array(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value would be an array in JSON: any sequence but text and bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def says_nothing(value: Any) -> bool:
    """Whether a value is null or empty: columnar data sets fill in what is missing."""
    return value is None or (isinstance(value, (str, Sequence, Mapping)) and len(value) == 0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise ValueError(f"the key {show(key)} stands twice in one object")
        keys[key] = value
    return keys


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def strict_json(text: str) -> Any:
    """Decode JSON like ``json.loads``, but raise a ValueError for duplicate keys, NaN and Infinity."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def decoded(text: str, place: Location) -> Any:
    """Decode a string that should hold JSON.

    Raises:
        DataError: If it does not.
    """
    try:
        return strict_json(text)
    except ValueError as error:
        raise place.wrong(f"a string that should hold JSON does not: {error}", text, "valid JSON") from None


def listed(value: Any, place: Location) -> Any:
    """A list that may stand in a string, as in CSV files and exports of tables; any other value as it is.

    Raises:
        DataError: If a string looks like a list or an object and is no JSON.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return decoded(value, place)
    return value


def dumped(value: Any, place: Location) -> str:
    """Write a value as JSON, without escapes for letters.

    Raises:
        DataError: If JSON cannot represent it.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise place.wrong(f"a value cannot be written as JSON: {error}", value, "a JSON value") from None


def encodable(text: str, place: Location) -> str:
    """The text, if UTF-8 can encode it.

    Raises:
        DataError: If it holds a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        expected, fix = "text that UTF-8 can encode", "replace it; it is left when an emoji is cut in half"
        raise place.wrong("a text holds half a character (a lone surrogate)", around, expected, fix) from None
    return text


def without_nulls(value: Any, place: Location) -> Any:
    """Copy a JSON value without its null keys.

    Raises:
        DataError: If JSON or UTF-8 cannot represent it.
    """
    if isinstance(value, Mapping):
        given = {_key(key, place): item for key, item in value.items() if item is not None}
        return {key: without_nulls(item, place.key(key)) for key, item in given.items()}
    if is_array(value):
        return [without_nulls(item, place.item(index)) for index, item in enumerate(value)]
    encodable(dumped(value, place), place)
    return value


def _key(key: Any, place: Location) -> str:
    if not isinstance(key, str):
        raise place.wrong("a key is not a string", key, "a string")
    return encodable(key, place)
