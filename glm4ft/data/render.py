"""Writes the messages of a conversation as blocks: what serving sends, and what the model samples after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from glm4ft.data.conversation import Message
from glm4ft.data.turn_format import CLOSED, FORMATS, FormatName, Piece, TurnFormat, pieces, split_reasoning
from glm4ft.errors import DataError, show

Place = Callable[[int], str]  # the index of a message to its place, for error messages

# The turns that carry their reasoning: those that the checkpoint's template gives it by default, all, or none.
ReasoningTurns = Literal["template", "kept", "none"]


@dataclass(frozen=True)
class Block:
    """One message, or one assistant turn, not yet encoded.

    Args:
        role: The role of the message.
        message: The index of the message, of a turn's first one; None for the tool block.
        given: What serving sends after the header.
        sampled: What the model samples after that; empty for every role but the assistant.
        has_header: Whether the block begins with the role's control token; a result behind another has none.
        is_call: Whether the turn ends with a tool call.
        is_served: Whether some prompt of serving ends where the sampled part begins.
    """

    role: str
    message: int | None
    given: tuple[Piece, ...]
    sampled: tuple[Piece, ...] = ()
    has_header: bool = True
    is_call: bool = False
    is_served: bool = True


@dataclass(frozen=True)
class Turn:
    """The messages of one turn, or one message of another role.

    Args:
        index: The index of its first message.
        messages: Its messages; several only where one generation wrote text and calls.
        reasoning: The reasoning before the answer; "" if there is none.
        answer: The text without its reasoning.
    """

    index: int
    messages: tuple[Message, ...]
    reasoning: str = ""
    answer: str = ""

    @property
    def role(self) -> str:
        """The role of its messages."""
        return self.messages[0].role


class Renderer:
    """Writes conversations in one chat format.

    Args:
        name: The format.
        reasoning: The turns that carry their reasoning.
    """

    def __init__(self, name: FormatName, reasoning: ReasoningTurns = "template") -> None:
        self.name, self.format, self.reasoning = name, FORMATS[name], reasoning

    def blocks(self, messages: Sequence[Message], place: Place, *, thinking: bool | None = None) -> list[Block]:
        """Write messages in the order of the format.

        Args:
            messages: The messages.
            place: The place of each.
            thinking: Whether serving asks the model to think before the turn that follows the messages; None if
                nothing follows, so that the messages themselves show it.
        Returns:
            A block per turn or message.
        Raises:
            DataError: If the format has no place for a part of a message.
        """
        turns = self.turns(messages, place)
        carried = self.carrying(turns, is_open=thinking is not None)
        asks_to_think = bool(carried) if thinking is None else thinking
        if self.format.systems_first:
            turns = sorted(turns, key=lambda turn: turn.role != "system")
        blocks: list[Block] = []
        for turn in turns:
            if turn.role == "assistant":
                blocks.append(self._turn(turn, turn.index in carried, place))
            else:
                follows = bool(blocks) and blocks[-1].role == turn.role == "observation"
                blocks.append(self._message(turn, asks_to_think, has_header=not (follows and self.format.joins)))
        return blocks

    def turns(self, messages: Sequence[Message], place: Place) -> list[Turn]:
        """Group the messages of each turn, and tell its reasoning from its answer."""
        groups: list[tuple[int, list[Message]]] = []
        for index, message in enumerate(messages):
            if self.format.joins and message.continues and message.is_call and groups:
                groups[-1][1].append(message)
            else:
                groups.append((index, [message]))
        return [self._read(index, tuple(group), place) for index, group in groups]

    def carrying(self, turns: Sequence[Turn], *, is_open: bool) -> set[int]:
        """The indices of the turns that are rendered with their reasoning.

        Args:
            turns: The turns of a conversation.
            is_open: Whether another turn follows. If not, what follows the last assistant turn changes nothing: serving
                had sent that turn's prompt before.
        """
        answers = [turn for turn in turns if turn.role == "assistant"]
        if self.format.reasoning is None or self.reasoning == "none" or not answers:
            return set()
        if not self.format.reasoning.skipped:  # the template takes the reasoning out of every turn that has ended
            answers = [] if is_open else answers[-1:]
        elif self.reasoning == "template":
            asked = [
                turn.index for turn in turns if turn.role == "user" and (is_open or turn.index < answers[-1].index)
            ]
            answers = [turn for turn in answers if turn.index > max(asked, default=-1)]
        return {turn.index for turn in answers if turn.reasoning}

    def warnings(self, messages: Sequence[Message], place: Place, wanted: frozenset[int]) -> list[str]:
        """Sentences about reasoning, and turns for want of it, that are not trained though they were wanted.

        Args:
            messages: The messages of a conversation.
            place: The place of each.
            wanted: The indices of the turns that are to be trained.
        """
        turns = [turn for turn in self.turns(messages, place) if turn.index in wanted]
        if self.format.reasoning is None:
            held = [turn for turn in turns if CLOSED in turn.messages[0].content]
            return [f"{place(turn.index)} holds reasoning tags, which are plain text in {self.name}" for turn in held]
        carried = self.carrying(self.turns(messages, place), is_open=False)
        left_out = [turn for turn in turns if turn.index not in carried]
        if not self.format.reasoning.skipped:
            return [
                f"{place(turn.index)} is context only: {self.name} samples no answer without reasoning"
                for turn in left_out
            ]
        return [
            f"{place(turn.index)}: its reasoning is not trained: serving leaves it out once another question follows"
            if self.reasoning == "template"
            else f"{place(turn.index)}: its reasoning is left out, as was asked for"
            for turn in left_out
            if turn.reasoning
        ]

    def _read(self, index: int, messages: tuple[Message, ...], place: Place) -> Turn:
        first = messages[0]
        if self.format.reasoning is None:
            if first.reasoning:
                self._refuse(
                    "a message holds reasoning", place(index), first.reasoning,
                    f"none: the format {self.name} has no place for reasoning, it would be lost",
                    "remove the key, or train a checkpoint that reasons, as GLM-Z1 or GLM-4.5",
                )  # fmt: skip
            return Turn(index, messages)
        if first.role != "assistant":
            if self.format.cut and CLOSED in first.content:
                self._refuse(
                    f"a text holds {CLOSED}, and the checkpoint's template cuts everything before it", place(index),
                    first.content, f"text without {CLOSED}", "rewrite the text",
                )  # fmt: skip
            return Turn(index, messages)
        answer = "" if first.is_call else first.content
        if first.reasoning:
            return self._checked(Turn(index, messages, first.reasoning.strip(), answer), place)
        try:
            reasoning, answer = split_reasoning(answer)
        except ValueError:
            self._refuse(
                "reasoning and answer cannot be told apart", place(index), answer,
                "one <think>reasoning</think> at the beginning, then the answer",
                "write the reasoning as reasoning_content",
            )  # fmt: skip
        return self._checked(Turn(index, messages, reasoning.strip(), answer), place)

    def _checked(self, turn: Turn, place: Place) -> Turn:
        if not (turn.answer.strip() or turn.messages[-1].is_call):
            self._refuse(
                "an answer is blank", place(turn.index), turn.messages[0].content, "text or a call",
                f"give it text, or remove the message: {self.name} writes answers without white space at both ends",
            )  # fmt: skip
        return turn

    def _turn(self, turn: Turn, carries: bool, place: Place) -> Block:
        reasoning, parts = self.format.reasoning, list[Piece]()
        given = pieces((reasoning.prompt if carries else reasoning.skipped) if reasoning else "")
        if reasoning and carries:
            parts += pieces(reasoning.thought, reasoning=turn.reasoning)
        for offset, message in enumerate(turn.messages):
            text = self.format.text_of("assistant", turn.answer if reasoning else message.content)
            if message.is_call:
                parts += self._call(message, place(turn.index + offset))
            elif text:
                parts += pieces(self.format.message, text=text)
        is_call = turn.messages[-1].is_call
        is_served = reasoning is None or bool(reasoning.skipped) or (carries and not is_call)
        return Block("assistant", turn.index, tuple(given), tuple(parts), is_call=is_call, is_served=is_served)

    def _call(self, message: Message, where: str) -> list[Piece]:
        try:
            return self.format.call_pieces(message.metadata, message.content)
        except ValueError as error:
            self._refuse(
                f"the arguments of a call cannot be written: {error}", where, message.content,
                f"a JSON object: {self.name} writes one argument after the other", "write the arguments as an object",
            )  # fmt: skip

    def _message(self, turn: Turn, thinking: bool, *, has_header: bool) -> Block:
        switch = self.format.reasoning.switch if self.format.reasoning and not thinking else ""
        text = self.format.text_of(turn.role, turn.messages[0].content)
        if turn.role == "observation":
            body = pieces(self.format.observation, text=text)
        elif turn.role == "user" and switch:
            body = [*pieces(self.format.message, text=text.removesuffix(switch)), Piece(switch, is_marker=True)]
        else:
            body = pieces(self.format.message, text=text)
        return Block(turn.role, turn.index, tuple(body), has_header=has_header)

    def _refuse(self, problem: str, where: str, found: str, expected: str, fix: str) -> NoReturn:
        raise DataError(problem, where=where, found=show(found), expected=expected, fix=fix)


def prompt_pieces(turn_format: TurnFormat, *, thinking: bool) -> tuple[Piece, ...]:
    """What serving sends after the header of the turn that it asks for.

    Args:
        turn_format: The chat format.
        thinking: Whether the model shall think; where a format always thinks, that is not asked.
    """
    reasoning = turn_format.reasoning
    if reasoning is None:
        return ()
    return tuple(pieces(reasoning.prompt if thinking or not reasoning.skipped else reasoning.skipped))
