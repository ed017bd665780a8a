"""One validated type for a conversation, and the reader that yields it from JSONL files.

Whatever its record looked like, a conversation is a tuple of messages with one of four roles; a tool call is an
assistant message whose ``metadata`` names the tool and whose content is the argument text. Text is
verbatim. A record that cannot be kept whole is refused with its file, line and field.
"""

from __future__ import annotations

import codecs
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glm4ft.data.sources import Draft, Role, SourceMessage, read_record, strict_json
from glm4ft.errors import DataError, Location, show

__all__ = ["Conversation", "Message", "Role", "from_messages", "parse_conversation", "read_conversations"]


@dataclass(frozen=True)
class Message:
    """One message.

    Args:
        role: who acts.
        content: verbatim text, never empty; for a tool call the argument text.
        metadata: the tool's name if this assistant turn is a tool call, "" for a reply and for every other role.
        loss: False if this assistant turn is context only; always True for every other role.
    """

    role: Role
    content: str
    metadata: str = ""
    loss: bool = True

    @property
    def is_call(self) -> bool:
        """Whether this is a tool call."""
        return self.role == "assistant" and self.metadata != ""


@dataclass(frozen=True)
class Conversation:
    """Messages that keep the rules of this module; made by ``parse_conversation``, which checks them.

    Args:
        messages: in order, with at least one assistant message.
        tools: the declared tools, each ``{"type": "function", "function": {...}}`` or a typed built-in.
        line: 1-based line in its file; 0 if it is not from a file.
        path: its file, or "".
        notes: what the reader left unused.
        places: the field that each message was read from.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    line: int = 0
    path: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    places: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def where(self, index: int | None = None) -> str:
        """The conversation's file and line, or those of one message with its field, for a message to the user."""
        return str(Location(self.path, self.line, "" if index is None else self._field(index)))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but probably not meant, one sentence each."""
        return (*self.notes, *self._undeclared_calls(), *self._missing_targets())

    def _field(self, index: int) -> str:
        return self.places[index] if len(self.places) == len(self.messages) else f"messages[{index}]"

    def _undeclared_calls(self) -> Iterator[str]:
        names = {tool["function"]["name"] if tool["type"] == "function" else tool["type"] for tool in self.tools}
        for index, message in enumerate(self.messages):
            if message.is_call and message.metadata not in names:
                yield f"{self._field(index)} calls {show(message.metadata)}, which is not among the declared tools"

    def _missing_targets(self) -> Iterator[str]:
        if not any(message.role == "assistant" and message.loss for message in self.messages):
            yield "no assistant message has its loss on: the conversation has no target"
        if self.messages and self.messages[-1].role != "assistant":
            yield f"ends with a message of role {self.messages[-1].role}: it is context without a target"


def parse_conversation(record: Any, *, line: int = 0, path: str = "") -> Conversation:
    """Read and validate one record.

    Args:
        record: a decoded JSON value in one of four shapes: GLM-4's messages, OpenAI's messages with tool calls,
            ShareGPT's conversations, or prompt and completion.
        line: 1-based line in its file; 0 = not from a file.
        path: its file, for messages to the user.

    Returns:
        The conversation. What it could not use but is harmless stands in its ``warnings``.

    Raises:
        DataError: if the record cannot be used whole.
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
        messages: as in a record ``{"messages": ...}``.
        tools: the declared tools, if any.

    Returns:
        The conversation.

    Raises:
        DataError: as ``parse_conversation``.
    """
    return parse_conversation({"messages": messages, "tools": tools})


def read_conversations(path: str | os.PathLike[str]) -> Iterator[Conversation]:
    """Read a JSONL file, one line at a time; nothing is opened before the first conversation is asked for.

    Args:
        path: a file in UTF-8 with one record per line; blank lines are skipped.

    Yields:
        The conversations in order, each with its line.

    Raises:
        DataError: at the first line that cannot be used, or if the file cannot be read or holds no conversation.
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
    return Message(turn.role, turn.content, turn.metadata, loss)


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
    """The one list of tools: at the top level or on the system message that comes first."""
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


def _raw_lines(name: str) -> Iterator[tuple[Location, bytes, int]]:
    """The lines of a file with their place and their offset in bytes, without a byte order mark."""
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
    """Decode one line; ``first`` and ``cut`` say whether it is the first record and lacks its newline."""
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
    """The error for a file that is one JSON document, most often a pretty-printed array."""
    kind, query = ("array", ".[]") if text.lstrip().startswith("[") else ("object", ".")
    lines = f"{os.path.splitext(os.path.basename(place.path))[0]}-lines.jsonl"  # never the file itself
    fix = f"convert it: jq -c '{query}' {shlex.quote(place.path)} > {shlex.quote(lines)}"
    return place.wrong(f"this file is one JSON {kind}, not JSONL", text.strip(), "one JSON object per line", fix)
