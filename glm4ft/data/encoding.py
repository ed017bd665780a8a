"""Conversations as rows: encoded, cut to length, and what becomes of those that cannot be used."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.data.inputs import DataInput
from glm4ft.data.read_options import ReadOptions
from glm4ft.data.reader import read_conversations
from glm4ft.data.refusals import Refusals
from glm4ft.errors import DataError

NO_TARGETS = "no supervised token"
TOO_LONG = "longer than max_length even with the last turn alone"
_LEAST_TOKENS = 2  # of a message: its header, and one for a newline and a text


@dataclass(frozen=True)
class Encoded:
    """What became of one record.

    Args:
        line: Its line or number; of several inputs together, counted on from one to the next.
        conversation: The conversation; None if the record cannot be used.
        row: The row; None if there is none.
        reason: Why there is no row; "" if there is one.
        repeats: How often the row is trained in an epoch, by the weight of its input.
        warnings: Sentences about parts of the conversation that are probably unintended.
        is_cut: Whether the row has lost the oldest turns of the conversation.
    """

    line: int
    conversation: Conversation | None = None
    row: EncodedRow | None = None
    reason: str = ""
    repeats: int = 1
    warnings: tuple[str, ...] = ()
    is_cut: bool = False


def encoded_conversations(
    inputs: Sequence[DataInput],
    chat_format: ChatFormat,
    max_length: int,
    options: ReadOptions,
    refusals: Refusals | None = None,
) -> Iterator[Encoded]:
    """Read and encode the conversations of some inputs, one at a time.

    Args:
        inputs: The inputs.
        chat_format: The encoder.
        max_length: The longest row, in tokens.
        options: How conversations are read.
        refusals: Takes what cannot be used; whoever gives it settles it. By default it is settled at the end.
    Yields:
        The outcome of each record, in order. Once the reading is bound to end in an error, nothing more is encoded or
        yielded; the rest is read to find all errors.
    Raises:
        DataError: If a conversation cannot be used and is not to be skipped; raised when all are read.
    """
    own, offset = refusals or Refusals(options.on_error), 0
    for one in inputs:
        last, num_rows = 0, 0
        for encoded in encode(read_conversations(one.name, options, own), chat_format, max_length, own):
            last = encoded.line
            if own.will_stop:
                continue
            if encoded.row is not None:
                row = replace(encoded.row, line=offset + last) if offset else encoded.row
                encoded = replace(encoded, row=row, repeats=one.repeats(num_rows))
                num_rows += 1
            yield replace(encoded, line=offset + last) if offset else encoded
        offset += last
    if refusals is None:
        own.settle()


def encode(
    conversations: Iterator[Conversation], chat_format: ChatFormat, max_length: int, refusals: Refusals
) -> Iterator[Encoded]:
    """Encode conversations, one at a time.

    Args:
        conversations: The conversations, of whose reading ``refusals`` is told.
        chat_format: The encoder.
        max_length: The longest row, in tokens.
        refusals: Takes what cannot be used.
    Yields:
        The outcome of each record, in order. Once the reading is bound to end in an error, nothing more is encoded.
    """
    for conversation in conversations:
        yield from _refused(refusals)
        try:
            if refusals.will_stop:
                chat_format.check(conversation)
                continue
            row, reason = fit_row(conversation, chat_format, max_length)
        except DataError as error:
            refusals.add(error, conversation.line)
            continue
        warnings = tuple(chat_format.warnings(conversation))
        is_cut = row is not None and len(row.turns) < chat_format.num_turns(conversation)
        yield Encoded(conversation.line, conversation, row, reason, int(row is not None), warnings, is_cut)
    yield from _refused(refusals)


def _refused(refusals: Refusals) -> Iterator[Encoded]:
    for message, line in refusals.new():
        yield Encoded(line, reason=message)


def fit_row(conversation: Conversation, chat_format: ChatFormat, max_length: int) -> tuple[EncodedRow | None, str]:
    """Encode a conversation, without its oldest exchanges if it would not fit otherwise.

    Prefix, tools, system messages and the last assistant turn with its question stay; nothing is cut on the right, so
    no stop token is lost and none has to be invented.

    Args:
        conversation: The conversation to encode.
        chat_format: The encoder.
        max_length: The longest row, in tokens.
    Returns:
        ``(row, "")``, or ``(None, reason)`` if the row has to be dropped. A row shorter than its conversation has
        fewer turns.
    """
    exchanges = _exchanges(conversation.messages)
    num_dropped = _num_too_many(conversation, exchanges, chat_format, max_length)
    if num_dropped == len(exchanges):
        return None, TOO_LONG
    if num_dropped:
        chat_format.check(conversation)  # what is cut off is not exempt
    kept = _without(conversation, exchanges[:num_dropped])
    row = chat_format.encode(kept)
    if (excess := len(row.input_ids) - max_length) > 0:
        sizes = collections.Counter[int | None]()
        for segment in row.segments:
            sizes[segment.message] += segment.end - segment.start
        exchanges = _exchanges(kept.messages)
        # the exchanges are dropped from the oldest on, the last one never
        left = itertools.accumulate((sum(sizes[i] for i in exchange) for exchange in exchanges[:-1]), initial=0)
        num_dropped = next((num for num, size in enumerate(left) if size >= excess), len(exchanges))
        if num_dropped == len(exchanges):
            return None, TOO_LONG
        row = chat_format.encode(_without(kept, exchanges[:num_dropped]))
    return (row, "") if any(row.supervised) else (None, NO_TARGETS)


def _num_too_many(
    conversation: Conversation, exchanges: list[set[int]], chat_format: ChatFormat, max_length: int
) -> int:
    """The number of oldest exchanges that certainly do not fit, at little cost; all of them if the last one does not.

    Encoding takes 200 bytes of memory for each byte of text, and the texts may be longer than any row by far.
    """
    messages = conversation.messages
    too_long = {i for i, message in enumerate(messages) if chat_format.exceeds(message, max_length)}
    if too_long & {i for i, message in enumerate(messages) if message.role == "system"}:
        return len(exchanges)
    num = max((number for number, exchange in enumerate(exchanges, start=1) if exchange & too_long), default=0)
    num_messages = len(messages) - sum(map(len, exchanges[:num]))
    while num < len(exchanges) - 1 and _LEAST_TOKENS * num_messages > max_length:
        num_messages -= len(exchanges[num])
        num += 1
    return num


def _without(conversation: Conversation, exchanges: list[set[int]]) -> Conversation:
    dropped = set[int]().union(*exchanges)
    messages = tuple(message for i, message in enumerate(conversation.messages) if i not in dropped)
    return replace(conversation, messages=messages) if dropped else conversation


def _exchanges(messages: tuple[Message, ...]) -> list[set[int]]:
    """Indices of the messages in groups, each from a question to the last assistant turn that answers it.

    System messages are in no group. What follows the last assistant turn belongs to the last group.
    """
    groups: list[set[int]] = [set()]
    has_answer = False
    last_answer = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    for i, message in enumerate(messages):
        if message.role == "system":
            continue
        if message.role == "user" and has_answer and i < last_answer:
            groups.append(set())
            has_answer = False
        groups[-1].add(i)
        has_answer = has_answer or message.role == "assistant"
    return groups
