"""Reads validated conversations from files of records or from single records.

A record that cannot be represented in full is refused with its file, line and field.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from glm4ft.data.call_binding import bind_results
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.json_values import strict_json
from glm4ft.data.read_options import AS_IS, ReadOptions
from glm4ft.data.record_files import Records, read_records
from glm4ft.data.refusals import Refusals
from glm4ft.data.source_message import SourceMessage
from glm4ft.data.sources import Draft, read_record
from glm4ft.data.written_calls import find_written_calls
from glm4ft.errors import DataError, Location, Unit


def parse_conversation(
    record: Any, *, line: int = 0, path: str = "", unit: Unit = "line", options: ReadOptions = AS_IS
) -> Conversation:
    """Read and validate one record.

    Args:
        record: A decoded JSON value of any shape that ``sources`` reads.
        line: The line of the record in its file, from 1; 0 if it is not from a file.
        path: The file of the record, for messages to the user.
        unit: What ``line`` counts.
        options: What the user says about the records.

    Returns:
        The conversation. Its ``warnings`` list the parts of the record that are probably not meant.

    Raises:
        DataError: If the record cannot be represented in full.
    """
    place = Location(path, line, unit=unit)
    try:
        draft = read_record(options.renamed(record, place), place, options.named)
        tools = _declared_tools(draft, place)
    except RecursionError:
        raise place.wrong("a record is nested too deeply", record, "a few levels of objects and lists") from None
    turns = [read for turn in draft.turns for read in _written_calls(turn, tools, options)]
    _check_order(turns, tools)
    turns, unmatched = bind_results(turns)
    # without a system message that only carried the tools; an empty result is a result
    turns = [turn for turn in turns if turn.content or turn.role == "observation"]
    messages, places = tuple(map(_message, turns)), tuple(turn.place.field for turn in turns)
    notes = (*_notes(draft), *unmatched, *_odd_arguments(turns, tools))
    return Conversation(messages, tools, line, path, notes, draft.unknown, places, unit)


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


def read_conversations(
    path: str | os.PathLike[str], options: ReadOptions = AS_IS, refusals: Refusals | None = None
) -> Iterator[Conversation]:
    """Read a file of records lazily, one record at a time; it is opened when the first conversation is requested.

    Args:
        path: A file, a folder of a data set, or the id of one of the hub.
        options: What the user says about the records.
        refusals: Takes the conversations that cannot be used; whoever gives it settles it. By default they are an
            error once all are read, if ``options`` do not skip them.

    Yields:
        The conversations in order, each with its line or the number of its record.

    Raises:
        DataError: If a record cannot be used, the file cannot be read, or it holds no conversation.
    """
    name, own = os.fspath(path), refusals or Refusals(options.on_error)
    read_before = own.read
    yield from parse_records(read_records(name), options, own)
    require_records(name, own.read - read_before)
    if refusals is None:
        own.settle()


def parse_records(records: Records, options: ReadOptions, refusals: Refusals) -> Iterator[Conversation]:
    """Validate records, one at a time.

    Args:
        records: The records and their places, as ``read_records`` yields them.
        options: What the user says about the records.
        refusals: Takes the conversations that cannot be used.

    Yields:
        The conversations in order.
    """
    for place, record in records:
        refusals.read += 1
        try:
            if isinstance(record, DataError):
                raise record
            yield parse_conversation(record, line=place.line, path=place.path, unit=place.unit, options=options)
        except DataError as error:
            refusals.add(error, place.line)


def require_records(name: str, num_records: int) -> None:
    """Require that a file holds a record.

    Args:
        name: The file.
        num_records: The number of records that were read.

    Raises:
        DataError: If there is none.
    """
    if not num_records:
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
    functions = {tool["function"]["name"] for tool in tools if "function" in tool}
    for before, turn in zip((None, *roles), turns, strict=False):
        if turn.role == "observation" and before not in ("assistant", "observation"):
            expected = "an assistant turn or another observation before it"
            raise turn.place.wrong("an observation follows nothing that asked for it", before, expected)
        if turn.metadata and not tools:
            fix = "declare the tools at the top level of the record"
            raise turn.place.wrong("a tool call in a conversation without tools", turn.metadata, "tools", fix)
        if turn.is_json_call and turn.metadata in functions and not _is_object(turn.content):
            fix = 'write them as JSON, such as {"city": "Bonn"} with double quotes'
            raise turn.place.wrong("the arguments of a call are no JSON object", turn.content, "a JSON object", fix)


def _odd_arguments(turns: Sequence[SourceMessage], tools: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tell arguments that GLM-4's own format allows, as it does for code, but that a function does not take."""
    functions = {tool["function"]["name"] for tool in tools if "function" in tool}
    for turn in turns:
        if turn.metadata in functions and not _is_object(turn.content):
            yield f"{turn.place.field} calls a function with arguments that are no JSON object"


def _is_object(text: str) -> bool:
    try:
        return isinstance(strict_json(text), dict)
    except (ValueError, RecursionError):
        return False


def _written_calls(
    turn: SourceMessage, tools: Sequence[dict[str, Any]], options: ReadOptions
) -> Iterator[SourceMessage]:
    """Refuse a call of a declared tool in the text of an answer, or read it if the user says so."""
    names = [str(tool["function"]["name"] if "function" in tool else tool["type"]) for tool in tools]
    is_reply = turn.role == "assistant" and not turn.metadata
    written = find_written_calls(turn.content, names) if is_reply and names else None
    if written is None:
        yield turn
        return
    if not options.calls_in_content:
        name = written.calls[0].name
        expected = "a call as metadata, tool_calls or function_call: as text it would be trained as a plain answer"
        fix = (
            f'write {{"metadata": {json.dumps(name)}, "content": arguments}}, or read such calls with '
            "--calls_in_content true, or remove the tool's declaration"
        )
        raise turn.place.wrong("an answer calls a declared tool in its text", turn.content, expected, fix)
    parts = [replace(turn, content=written.before)] if written.before else []
    for call in written.calls:
        if call.arguments is None:
            expected = 'arguments such as {"city": "Bonn"}'
            raise turn.place.wrong(
                "a call in an answer's text has arguments that cannot be read", turn.content, expected
            )
        parts.append(replace(turn, content=call.arguments, metadata=call.name, tools=()))
    yield parts[0]
    yield from (replace(part, reasoning="", continues=True) for part in parts[1:])
