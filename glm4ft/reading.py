"""Reads files that somebody else may have written, cut or damaged: whatever is in them, the error is one for users.

Conversations have a reader of their own (``data.reader``); weights are read by safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from glm4ft.errors import InputError, show

Model = TypeVar("Model", bound=BaseModel)
_TOO_DEEP = "it is nested too deeply"


def read_text(path: Path, error: type[InputError], message: str) -> str:
    """Read a whole file in UTF-8.

    Args:
        path: The file. A pipe is read to its end; one that nobody writes to is empty.
        error: The class of the error.
        message: What cannot be done if the file cannot be read, for the error.
    Returns:
        The text.
    """
    try:
        with _opened(path) as file:
            return file.read().decode("utf-8")
    except (OSError, ValueError) as problem:  # ValueError: no UTF-8, or a name that no file can have
        raise _unreadable(path, error, message, problem) from problem


def decode_json(text: str, *, strict: bool = True) -> Any:
    """Decode JSON.

    Args:
        text: The text.
        strict: Whether NaN and infinity are refused; other trainers write them into their logs.
    Raises:
        ValueError: Whatever is wrong with the text: a nesting or a number that Python cannot read, too.
    """
    options: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite_float} if strict else {}
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def decode_yaml(text: str) -> Any:
    """Decode YAML without objects.

    Raises:
        ValueError: Whatever is wrong with the text.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def json_lines(
    path: Path, error: type[InputError], message: str, *, kind: str, skip_unfinished: bool = False, fix: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a file with one JSON object on each line, line by line.

    Args:
        path: The file.
        error: The class of the error.
        message: What cannot be done if the file cannot be read, for the error.
        kind: What a wrong line is not, for the error: ``an encoded row``.
        skip_unfinished: Whether to pass over a last line without a newline, which a killed writer leaves.
        fix: What to do about a file that cannot be read, or a line that is none.
    Yields:
        The place of each line, for messages, and the object on it.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n") or not skip_unfinished:
                    where = f"{path}, line {number}"
                    yield where, _object(line, where, error, kind, fix)
    except (OSError, ValueError) as problem:
        raise _unreadable(path, error, message, problem, fix) from problem


def _object(line: bytes, where: str, error: type[InputError], kind: str, fix: str) -> dict[str, Any]:
    shown = show(line[:200].decode("utf-8", "replace").strip())
    try:
        record = decode_json(line.decode("utf-8"))
    except ValueError as problem:
        raise error(f"not {kind}: the line is not JSON: {problem}", where=where, found=shown, fix=fix) from problem
    if not isinstance(record, dict):
        raise error(f"not {kind}: the line is no JSON object", where=where, found=shown, fix=fix)
    return record


def _opened(path: Path) -> BinaryIO:
    # without O_NONBLOCK, to open a pipe would wait for somebody to write to it
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def _unreadable(path: Path, error: type[InputError], message: str, problem: Exception, fix: str = "") -> InputError:
    return error(message, where=str(path), found=getattr(problem, "strerror", None) or str(problem), fix=fix)


def validated(
    model: type[Model], record: Any, *, where: str, error: type[InputError], kind: str, fix: str = ""
) -> Model:
    """Check the types of a record.

    Args:
        model: The type.
        record: The decoded record.
        where: The place of the record.
        error: The class of the error, whose message names the first field that is wrong.
        kind: What a wrong record is not, for the error: ``an encoded row``.
        fix: What to do about it.
    """
    try:
        return model.model_validate(record, strict=True)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        is_missing = first["type"] == "missing"
        raise error(
            f"not {kind}: " + ("a field is missing" if is_missing else "a field has a value that it cannot have"),
            where=f"{where}: {field}" if field else where,
            found=show(record if is_missing else first["input"]),
            expected=f"the field {field}" if is_missing else first["msg"].removeprefix("Input should be "),
            fix=fix,
        ) from None


def _finite_float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
