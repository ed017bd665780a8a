"""Readers for the accepted shapes of records, which produce plain turns with their places in the record.

This module handles spellings only: which keys a record has, and how they make up a conversation. The rules of a valid
conversation are in ``reader.py``. Data that cannot be represented is refused, not dropped.

Sources: the data format of THUDM/GLM-4 finetune_demo; the OpenAI chat fine-tuning format and Responses; ShareGPT and
Alpaca as read by LLaMA-Factory; the query/response format of ms-swift; TRL's prompt/completion format.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from glm4ft.data.conversation import Role
from glm4ft.data.json_values import is_array, listed, says_nothing
from glm4ft.data.known_keys import (
    RECORD_SHAPES,
    SYSTEM_KEYS,
    TOOL_KEYS,
    USED_IN_RECORD,
    Refusal,
    refuse_flag_of_record,
    refuse_lost_meaning,
    refused,
    unknown_keys,
)
from glm4ft.data.messages import is_message, read_messages, unknown_keys_of
from glm4ft.data.source_message import SourceMessage, text_of
from glm4ft.data.tool_calls import read_tools
from glm4ft.errors import DataError, Location

Record = Mapping[str, Any]
Reader = Callable[[Record, Location, "Shape"], Iterator[SourceMessage]]
SHAPES_IN_WORDS = (
    '{"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]}, '
    '{"prompt": ..., "completion": ...}, {"query": ..., "response": ...}, {"instruction": ..., "output": ...}'
)
# Columns that hold questions and answers in common data sets; for hints, never read by themselves.
_QUESTIONS = ("prompt", "question", "query", "instruction", "input", "content", "source", "user", "problem")
_ANSWERS = ("completion", "answer", "response", "output", "summary", "target", "assistant", "solution")
_CONTEXTS = ("context", "passage", "document")  # what a question is about: without it the answer is from nowhere
# Keys of records that are no conversations, and hold none under another key.
NO_CONVERSATION = {
    "input_ids": Refusal(
        "a record holds token ids, not a conversation",
        "the conversation: whether ids and labels fit this tokenizer and its format cannot be seen from them",
        "give the conversations that they were made from; glm4ft explain --rows looks at rows of another trainer",
    ),
    "segments": Refusal(
        "a record is one rendered text in segments, not a conversation",
        "the messages: the text was rendered for some template, and its segments are no turns",
        "give the messages that it was rendered from",
    ),
    "completions": Refusal(
        "a record holds steps, or several answers to one question",
        "one answer: steps with labels are process supervision, several answers a choice",
        "train a reward model on it with its own trainer, or write a record for each answer to be learnt",
    ),
}


@dataclass(frozen=True)
class Draft:
    """A record as turns, with its top-level tools and its unused keys.

    Args:
        turns: The messages, in order.
        tools: The lists of tools at the top level of the record.
        unread: The keys of other accepted shapes, which the reader of this record does not use.
        unknown: All other keys that say something and are not used; those of messages after ``messages[*].``.
    """

    turns: tuple[SourceMessage, ...]
    tools: tuple[tuple[dict[str, Any], ...], ...]
    unread: tuple[str, ...]
    unknown: tuple[str, ...] = ()


class Shape(NamedTuple):
    """A shape of records: the keys that it needs, those that it may have, and its reader."""

    keys: tuple[str, ...]
    read: Reader
    optional: tuple[str, ...] = ()


def read_record(record: Any, place: Location, named: frozenset[str] = frozenset()) -> Draft:
    """Read one record of any accepted shape.

    Args:
        record: A decoded JSON value: an object, or a list of messages.
        place: The file and line of the record.
        named: Keys that the user named, so that the record has to be of a shape that has them.

    Returns:
        The draft of the conversation, with at least one turn.

    Raises:
        DataError: If the shape is unknown or ambiguous, or a part of the record cannot be read.
    """
    if is_array(record) and record and is_message(record[0]):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise place.wrong("a record is not an object", record, SHAPES_IN_WORDS)
    refuse_lost_meaning(record, place)
    refuse_flag_of_record(record, place)
    shape = _shape_of(record, place, named)
    turns = list(shape.read(record, place, shape))
    if system := _system(record, place):
        if turns[0].role == "system":
            found, fix = system.content, f"remove it or {turns[0].place.field}"
            raise system.place.wrong("a record has two system prompts", found, "one", fix)
        turns.insert(0, system)
    used = {*shape.keys, *shape.optional, *USED_IN_RECORD}
    others = [key for other in SHAPES for key in (*other.keys, *other.optional) if key not in used]
    unread = tuple(key for key in dict.fromkeys(others) if not says_nothing(record.get(key)))
    unknown = [*unknown_keys(record, used | set(unread))]
    for key in (*shape.keys, *shape.optional):
        unknown += unknown_keys_of(record.get(key), key)
    tools = tuple(read_tools(record.get(key), place.key(key)) for key in TOOL_KEYS)
    return Draft(tuple(turns), tools, unread, tuple(dict.fromkeys(unknown)))


def _system(record: Record, place: Location) -> SourceMessage | None:
    """Read the system prompt that may stand beside the conversation, under any of its names."""
    given = [key for key in SYSTEM_KEYS if not says_nothing(record.get(key))]
    if len(given) > 1 and record[given[0]] != record[given[1]]:
        raise place.key(given[1]).wrong("a record has two system prompts", record[given[1]], "one", "keep one of them")
    if not given:
        return None
    at = place.key(given[0])
    return SourceMessage("system", text_of(record[given[0]], at), at)


def _shape_of(record: Record, place: Location, named: frozenset[str]) -> Shape:
    """Return the only shape that is complete, otherwise the first that is partly present."""
    shapes = [shape for shape in SHAPES if named <= {*shape.keys, *shape.optional}]
    fits = [shape for shape in shapes if all(record.get(key) not in (None, "") for key in shape.keys)]
    # Alpaca's records have all that a pair of input and output has
    fits = [s for s in fits if not any(set(s.keys) < {*other.keys, *other.optional} for other in fits if other != s)]
    if not fits:
        for key in record.keys() & NO_CONVERSATION.keys():
            raise refused(NO_CONVERSATION[key], record[key], place.key(key))
        begun = [shape for shape in shapes if record.get(shape.keys[0]) not in (None, "")]
        fits = (begun or [shape for shape in shapes if shape.keys[0] in record])[:1]
        others = [key for key in _ANSWERS if fits and key not in fits[0].keys and isinstance(record.get(key), str)]
        if others and len(fits[0].keys) > 1:
            raise _no_shape(record, place)  # a question with an answer by another name
    if len(fits) == 1:
        return fits[0]
    if fits:
        fix = "keep the keys of one shape, remove or rename the others"
        raise place.wrong("a record has the keys of several shapes", list(record), SHAPES_IN_WORDS, fix)
    raise _no_shape(record, place)


def _no_shape(record: Record, place: Location) -> DataError:
    """Return the error for a record of no known shape, with the way out that fits what it holds."""
    problem, fix = "a record has the keys of no known shape", "convert the record, or name its columns with --columns"
    texts = [key for key, value in record.items() if isinstance(value, str)]
    lists = {key: value for key, value in record.items() if is_array(value)}
    wrapped = next((key for key, value in lists.items() if value and isinstance(value[0], Mapping)), None)
    question = next((key for key in _QUESTIONS if key in texts), None)
    answer = next((key for key in _ANSWERS if key in texts and key != question), None)
    if texts == ["text"]:
        problem = "a record is one text, not a conversation"
        fix = "give the messages themselves: plain text has no answers to train on, and a rendered one has lost them"
    elif any(isinstance(value, Mapping) and "file_name" in value for value in record.values()):
        problem = "a file lists data sets, and holds no conversations"
        fix = "name the files that it lists"
    elif wrapped is not None and is_message(record[wrapped][0]):
        fix = f"name the list of messages: --columns messages={wrapped}"
    elif wrapped is not None and len(record) == 1:
        problem = "the file is an object around its records"
        lines = f"{os.path.splitext(os.path.basename(place.path))[0]}-lines.jsonl"
        fix = f"write the records alone: jq -c '.{wrapped}[]' {shlex.quote(place.path)} > {shlex.quote(lines)}"
    elif question and answer and (context := next((key for key in _CONTEXTS if key in texts), None)):
        named = {"instruction": question, "input": context, "output": answer}
        columns = ",".join(f"{name}={key}" for name, key in named.items() if name != key)
        fix = f"if these are a question, what it is about and the answer: --columns {columns}"
    elif question and answer:
        fix = f"if these are question and answer: --columns prompt={question},completion={answer}"
    elif len(texts) == 2:
        fix = f"if these are question and answer: --columns prompt={texts[0]},completion={texts[1]}"
    return place.wrong(problem, list(record), SHAPES_IN_WORDS, fix)


def _from_list(record: Record, place: Location, shape: Shape) -> Iterator[SourceMessage]:
    (key,) = shape.keys
    yield from read_messages(record.get(key), place.key(key))


def _from_prompt_completion(record: Record, place: Location, shape: Shape) -> Iterator[SourceMessage]:
    """Read TRL's two sides, the first of which is context."""
    for turn in _from_sides(record, place, shape):
        yield replace(turn, prompt=turn.place.field.startswith("prompt"))


def _from_sides(record: Record, place: Location, shape: Shape) -> Iterator[SourceMessage]:
    """Read a question and its answer, each a text or a list of messages, after the turns of the history."""
    yield from _history(record, place)
    sides: tuple[tuple[str, Role], ...] = ((shape.keys[0], "user"), (shape.keys[1], "assistant"))
    for key, role in sides:
        value, at = record.get(key), place.key(key)
        if is_array(value) and value and not _is_part(value[0]):
            yield from read_messages(value, at)
        else:
            yield SourceMessage(role, text_of(value, at), at)


def _from_alpaca(record: Record, place: Location, _: Shape) -> Iterator[SourceMessage]:
    """Read Alpaca's record: the question is the instruction, a newline, and the input where there is one."""
    yield from _history(record, place)
    given = [key for key in ("instruction", "input") if not says_nothing(record.get(key))]
    at = place.key((given or ["instruction"])[0])
    texts = [text_of(record[key], place.key(key)) for key in given]
    yield SourceMessage("user", text_of("\n".join(texts), at), at)
    yield SourceMessage("assistant", text_of(record.get("output"), place.key("output")), place.key("output"))


def _history(record: Record, place: Location) -> Iterator[SourceMessage]:
    history, at = record.get("history"), place.key("history")
    if not says_nothing(history := listed(history, at)):
        yield from read_messages(history, at)


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and not is_message(value) and "text" in value


_READERS: dict[tuple[str, ...], Reader] = {
    ("prompt", "completion"): _from_prompt_completion,
    ("instruction", "output"): _from_alpaca,
}
SHAPES = tuple(
    Shape(keys, _READERS.get(keys, _from_list if len(keys) == 1 else _from_sides), optional)
    for keys, optional in RECORD_SHAPES.items()
)
