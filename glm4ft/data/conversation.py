"""The validated type of a conversation, independent of the format of its record.

A conversation is a tuple of messages with one of four roles; a tool call is an assistant message whose ``metadata``
names the tool and whose content is the argument text. Text is verbatim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from glm4ft.data.foreign_text import foreign_text
from glm4ft.errors import Location, Unit, show

Role = Literal["system", "user", "assistant", "observation"]


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Args:
        role: The role of the message's author.
        content: The verbatim text; for a tool call the argument text. Only the result of a tool may be empty.
        metadata: The tool's name if this assistant turn is a tool call, "" for a reply and for every other role.
        loss: False if this assistant turn is context only; always True for every other role.
        reasoning: What an assistant thought before it answered; "" if the record holds no reasoning of its own.
        continues: Whether one generation wrote this call and the assistant message before it.
    """

    role: Role
    content: str
    metadata: str = ""
    loss: bool = True
    reasoning: str = ""
    continues: bool = False

    @property
    def is_call(self) -> bool:
        """Whether the message is a tool call."""
        return self.role == "assistant" and self.metadata != ""


@dataclass(frozen=True)
class Conversation:
    """A validated conversation, made by ``parse_conversation``.

    Args:
        messages: The messages in order, at least one of them an assistant message.
        tools: The declared tools, each ``{"type": "function", "function": {...}}`` or a typed built-in.
        line: The line of the conversation in its file, or the number of its record in a file that has none, from 1; 0
            if it is not from a file.
        path: The file of the conversation; "" if it is not from a file.
        notes: Sentences about parts of the record that the reader did not use, or that do not fit together.
        unused: The keys of the record that no format gives a meaning to; those of messages after ``messages[*].``.
        places: The field of the record that each message was read from.
        unit: What ``line`` counts: ``line``, or ``record`` where a file has no line for each.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    line: int = 0
    path: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    unused: tuple[str, ...] = field(default=(), compare=False, repr=False)
    places: tuple[str, ...] = field(default=(), compare=False, repr=False)
    unit: Unit = field(default="line", compare=False, repr=False)

    def where(self, index: int | None = None) -> str:
        """Format the place of the conversation, or of one message, for a message to the user.

        Args:
            index: The index of the message; None for the whole conversation.
        Returns:
            The file and line, and the field of the message if there is an index.
        """
        field = "" if index is None else self.field_of(index)
        return str(Location(self.path, self.line, field, self.unit))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about parts of the record that are allowed but probably unintended."""
        return (
            *self.notes,
            *self._undeclared_calls(),
            *self._odd_order(),
            *self._foreign_texts(),
            *self._missing_targets(),
        )

    def field_of(self, index: int) -> str:
        """The field of the record that a message was read from.

        Args:
            index: The index of the message.
        """
        return self.places[index] if len(self.places) == len(self.messages) else f"messages[{index}]"

    def _undeclared_calls(self) -> Iterator[str]:
        names = {tool["function"]["name"] if tool["type"] == "function" else tool["type"] for tool in self.tools}
        for index, message in enumerate(self.messages):
            if message.is_call and message.metadata not in names:
                yield f"{self.field_of(index)} calls {show(message.metadata)}, which is not among the declared tools"

    def _odd_order(self) -> Iterator[str]:
        others = [index for index, message in enumerate(self.messages) if message.role != "system"]
        if others and self.messages[others[0]].role == "assistant":
            yield f"{self.field_of(others[0])} is an answer to nothing: the conversation starts with an assistant turn"
        for index, message in enumerate(self.messages):
            if message.role == "system" and index > others[0]:
                yield (
                    f"{self.field_of(index)} is a system message in the middle: some formats write it where it stands, "
                    "glm-4-0414 before the first turn"
                )

    def _foreign_texts(self) -> Iterator[str]:
        for index, message in enumerate(self.messages):
            for told in foreign_text(message.content, is_answer=message.role == "assistant"):
                yield f"{self.field_of(index)} {told}"

    def _missing_targets(self) -> Iterator[str]:
        if not any(message.role == "assistant" and message.loss for message in self.messages):
            yield "no assistant message has its loss on: the conversation has no target"
        if self.messages and self.messages[-1].role != "assistant":
            yield f"ends with a message of role {self.messages[-1].role}: it is context without a target"
