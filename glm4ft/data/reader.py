"""Reads validated conversations from a JSONL file or a single record.

A record that cannot be represented in full is refused with its file, line and field.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.sources import Draft, SourceMessage, read_record, strict_json
from glm4ft.errors import DataError, Location


def parse_conversation(record: Any, *, line: int = 0, path: str = "") -> Conversation:
    """Read and validate one record.

    Args:
        record: A decoded JSON value in one of four formats: GLM-4's messages, OpenAI's messages with tool calls,
            ShareGPT's conversations, or prompt and completion.
        line: The line of the record in its file, from 1; 0 if it is not from a file.
        path: The file of the record, for messages to the user.

    Returns:
        The conversation. Its ``warnings`` list the parts of the record that were ignored because they are harmless.

    Raises:
        DataError: If the record cannot be represented in full.
    """
    place = Location(path, line)
    try:
        draft = read_record(record, place)
        tools = _declared_tools(draft, place)
    except RecursionError:
        raise place.wrong("a record is nested too deeply", record, "a few levels of objects and lists") from None
    _check_order(draft.turns, tools)
    turns = [turn for turn in draft.turns if turn.content]  # without a system message that only carried the tools
    messages, places = tuple(map(_message, turns)), tuple(turn.place.field for turn in turns)
    return Conversation(messages, tools, line, path, tuple(_notes(draft)), places)


def from_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> Conversation:
    """Validate messages that do not come from a file.

    Args:
        messages: The messages, as in a record ``{"messages": ...}``.
        tools: The declared tools, if any.

    Returns:
        The conversation.

    Raises:
        DataError: If the messages or the tools cannot be used, as for ``parse_conversation``.
    """
    return parse_conversation({"messages": messages, "tools": tools})


def read_conversations(path: str | os.PathLike[str]) -> Iterator[Conversation]:
    """Read a JSONL file lazily, one line at a time; the file is opened when the first conversation is requested.

    Args:
        path: A file in UTF-8 with one record per line; blank lines are skipped.

    Yields:
        The conversations in order, each with its line number.

    Raises:
        DataError: If a line cannot be used, the file cannot be read, or it holds no conversation.
    """
    name = os.fspath(path)
    empty = True
    for place, raw, offset in _raw_lines(name):
        if not raw.strip():
            continue
        record = _decode(_text(raw, place, offset), place, first=empty, cut=not raw.endswith(b"\n"))
        empty = False
        yield parse_conversation(record, line=place.line, path=name)
    if empty:
        raise Location(name).wrong("a file holds no conversation", "no line that is not blank", "one record per line")


def _message(turn: SourceMessage) -> Message:
    loss = turn.role != "assistant" or not (turn.prompt or turn.loss is False)
    return Message(turn.role, turn.content, turn.metadata, loss, turn.reasoning, turn.continues)


def _notes(draft: Draft) -> Iterator[str]:
    for key in draft.unread:
        yield f"{key} is ignored: the conversation is read from {draft.turns[-1].place.field.split('[')[0]}"
    for turn in draft.turns:
        if turn.loss and turn.role != "assistant":
            at = turn.place.field
            yield f"{at}: loss on a {turn.role} message is ignored: only assistant turns can be targets"
        elif turn.loss and turn.prompt:
            yield f"{turn.place.field}: loss on a message of the prompt is ignored: a prompt is context"


def _declared_tools(draft: Draft, place: Location) -> tuple[dict[str, Any], ...]:
    """Return the conversation's tools, declared at the top level or on a system message that comes first."""
    for index, turn in enumerate(draft.turns):
        if turn.tools and (turn.role != "system" or index > 0):
            expected, fix = "tools on a system message that comes first", "move them to the top level of the record"
            raise turn.place.key("tools").wrong(f"a {turn.role} message carries tools", turn.tools, expected, fix)
    declared = [tools for tools in (*draft.tools, draft.turns[0].tools) if tools]
    if any(tools != declared[0] for tools in declared):
        raise place.key("tools").wrong("a record has two lists of tools that differ", declared, "one", "keep one list")
    return declared[0] if declared else ()


def _check_order(turns: Sequence[SourceMessage], tools: Sequence[dict[str, Any]]) -> None:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        fix = "add the answer to learn, or remove the record"
        raise turns[-1].place.wrong("a conversation has no assistant turn", roles, "at least one", fix)
    for before, turn in zip((None, *roles), turns, strict=False):
        if turn.role == "observation" and before not in ("assistant", "observation"):
            expected = "an assistant turn or another observation before it"
            raise turn.place.wrong("an observation follows nothing that asked for it", before, expected)
        if turn.metadata and not tools:
            fix = "declare the tools at the top level of the record"
            raise turn.place.wrong("a tool call in a conversation without tools", turn.metadata, "tools", fix)
        if turn.role == "assistant" and not turn.metadata and (name := _called_in_text(turn.content, tools)):
            expected = "a call as metadata, tool_calls or function_call: as text it would be trained as a plain answer"
            fix = f'write {{"metadata": {json.dumps(name)}, "content": arguments}}, or remove the tool\'s declaration'
            raise turn.place.wrong("an answer calls a declared tool in its text", turn.content, expected, fix)


def _called_in_text(content: str, tools: Sequence[dict[str, Any]]) -> str:
    """The declared tool that a text calls as GLM-4 renders calls, name and newline, or as code; "" if it calls none."""
    names = [str(tool["function"]["name"] if "function" in tool else tool["type"]) for tool in tools]
    return next((name for name in names if re.match(rf"\s*{re.escape(name)}\s*(\n|\{{|\(\s*[\w{{)])", content)), "")


def _raw_lines(name: str) -> Iterator[tuple[Location, bytes, int]]:
    """Yield the lines of a file, each with its place and its offset in bytes; a byte order mark is removed."""
    if os.path.isdir(name):
        raise Location(name).wrong("this is a directory", name, "a JSONL file", "name the file in it")
    try:
        with open(name, "rb") as file:
            offset = 0
            for line, raw in enumerate(file, 1):
                mark = len(codecs.BOM_UTF8) if line == 1 and raw.startswith(codecs.BOM_UTF8) else 0
                yield Location(name, line), raw[mark:], offset + mark
                offset += len(raw)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Location(name).wrong(f"a file cannot be read: {reason}", name, "a JSONL file that can be read") from None


def _text(raw: bytes, place: Location, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = (
            f"a line is not UTF-8 at byte {error.start + 1} of the line, offset {offset + error.start} in the file"
        )
        fix = (
            "convert the file to UTF-8" if raw.endswith(b"\n") else "convert it to UTF-8; or the file is truncated here"
        )
        around = raw[max(0, error.start - 8) : error.start + 8]
        raise place.wrong(problem, around, "UTF-8 text", fix) from None


def _decode(text: str, place: Location, *, first: bool, cut: bool) -> Any:
    """Decode one line.

    Args:
        text: The line.
        place: The place of the line.
        first: True for the first record of the file.
        cut: True if the line has no newline at its end.
    Returns:
        The decoded JSON value.
    """
    try:
        record = strict_json(text)
    except RecursionError:
        raise place.wrong("a line is nested too deeply", text, "a few levels of objects and lists") from None
    except json.JSONDecodeError as error:
        if first and (text.lstrip().startswith("[") or text.strip() == "{"):
            raise _one_document(text, place) from None
        raise _malformed(error, place, cut=cut) from None
    except ValueError as error:
        raise place.wrong(
            f"a line is not strict JSON: {error}", text, "JSON with unique keys and finite numbers"
        ) from None
    if first and isinstance(record, list):
        raise _one_document(text, place)
    return record


def _malformed(error: json.JSONDecodeError, place: Location, *, cut: bool) -> DataError:
    around = error.doc[max(0, error.pos - 30) : error.pos + 30]
    problem, fix = f"a line is not JSON at column {error.colno}: {error.msg}", "write one JSON object per line"
    if cut:
        problem, fix = f"{problem}; the file looks truncated", "copy or write the file again, or remove its last line"
    return place.wrong(problem, around, "one JSON object on the line", fix)


def _one_document(text: str, place: Location) -> DataError:
    """Return the error for a file that is a single JSON document, most often a pretty-printed array."""
    kind, query = ("array", ".[]") if text.lstrip().startswith("[") else ("object", ".")
    lines = f"{os.path.splitext(os.path.basename(place.path))[0]}-lines.jsonl"  # never the file itself
    fix = f"convert it: jq -c '{query}' {shlex.quote(place.path)} > {shlex.quote(lines)}"
    return place.wrong(f"this file is one JSON {kind}, not JSONL", text.strip(), "one JSON object per line", fix)
