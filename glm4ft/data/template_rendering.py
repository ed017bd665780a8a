"""Renders a conversation with a chat template, and tells each character of the text its message.

Texts are rendered as placeholders first, so it is known which characters are theirs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from glm4ft.data.conversation import Message
from glm4ft.data.encoded_row import Part
from glm4ft.data.time_limit import TEMPLATE_LIMIT_S, within
from glm4ft.errors import DataError, show

_PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")  # private use: no template writes these


class Stretch(NamedTuple):
    """A run of characters with one origin.

    Args:
        text: The characters.
        is_content: Whether they are the text of a message, and not the template's.
        role: The role of their message; "" behind the last turn.
        part: The part of the message.
        message: The index of the message.
        turn: The turn that samples these characters, as the index of its message; None for context.
    """

    text: str
    is_content: bool
    role: str
    part: Part
    message: int | None
    turn: int | None


class TemplateRenderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: A fast tokenizer with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control_ids = dict(tokenizer.get_added_vocab())
        names = sorted(self.control_ids, key=len, reverse=True)
        self.markers = re.compile("|".join(map(re.escape, names)) or "(?!)")  # the name of any control token

    def render(self, messages: Sequence[Message], is_open: bool, place: Callable[[int], str]) -> str:
        """Render messages with the chat template.

        Args:
            messages: The messages.
            is_open: Whether the text ends with the generation prompt.
            place: The place of a message in its file, by its index.
        Raises:
            DataError: If the template raises an error or does not end in time.
        """
        rendered: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages]
        try:
            render = functools.partial(
                self.tokenizer.apply_chat_template, rendered, tokenize=False, add_generation_prompt=is_open
            )
            return str(within(TEMPLATE_LIMIT_S, render))
        except Exception as error:  # a template is a program and can raise anything
            raise refused(
                "the chat template cannot render the conversation", place(len(messages) - 1),
                "a conversation that the template accepts", found=" ".join(str(error).split())[:300],
            ) from error  # fmt: skip

    def stretches(
        self,
        messages: Sequence[Message],
        trained: frozenset[int],
        terminator_id: int,
        place: Callable[[int], str],
        *,
        is_open: bool,
    ) -> list[Stretch]:
        """Tell each character of the rendered conversation its message, and whether the model samples it.

        Args:
            messages: The messages.
            trained: The indices of the messages whose turns are trained.
            terminator_id: The control token that ends a turn.
            place: The place of a message in its file, by its index.
            is_open: Whether the text ends with the generation prompt.
        Raises:
            DataError: If the template changes a text, leaves one out, or renders a trained turn otherwise than the
                prompt that asks for it.
        """
        whole = self.render(placeholders(messages), is_open, place)
        found = list(_PLACEHOLDER.finditer(whole))
        order = [int(match[1]) for match in found]
        if sorted(order) != list(range(len(messages))):
            lost = next((i for i in range(len(messages)) if order.count(i) != 1), 0)
            raise refused(f"the chat template writes the message {order.count(lost)} times", place(lost), "once")
        texts = [message.content for message in messages]
        if self.render(messages, is_open, place) != _PLACEHOLDER.sub(lambda match: texts[int(match[1])], whole):
            changed = next((i for i in order if not self._keeps(messages, i, place)), order[0])
            raise refused(
                "the chat template changes the text of a message", place(changed), "the text, verbatim",
                found=show(texts[changed]), fix="write the text as the template leaves it (often without white space "
                "at its ends), or train a checkpoint whose template keeps it",
            )  # fmt: skip
        stretches, end = list[Stretch](), 0
        for number, match in enumerate(found):
            index = order[number]
            role, follows = messages[index].role, found[number + 1].start() if number + 1 < len(found) else len(whole)
            border = self._border(messages, whole, index, match, place) if role == "assistant" else None
            stop = self.markers.search(whole, match.end(), follows) if border is not None else None
            if border is not None and (stop is None or self.control_ids[stop[0]] != terminator_id):
                border = None
            if index in trained and border is None:
                raise refused(
                    "the chat template renders this turn otherwise than the prompt that asks for it", place(index),
                    "the conversation up to the turn to begin with the turn's prompt, and a terminator behind it",
                    fix="make one conversation of each turn, or train the last turn only (--train_on last): the "
                    "template renders earlier turns otherwise than the last",
                )  # fmt: skip
            turn = index if border is not None else None
            begin = match.start() if border is None else border
            stretches.append(Stretch(whole[end:begin], False, role, "header", index, None))
            stretches.append(Stretch(whole[begin : match.start()], False, role, "body", index, turn))
            stretches.append(Stretch(texts[index], True, role, "body", index, turn))
            end = match.end()
            if stop is not None and border is not None:
                stretches.append(Stretch(whole[end : stop.end()], False, role, "terminator", index, turn))
                end = stop.end()
        tail: tuple[str, Part] = ("assistant", "header") if is_open else ("", "prefix")
        stretches.append(Stretch(whole[end:], False, *tail, None, None))
        return [stretch for stretch in stretches if stretch.text]

    def _border(
        self, messages: Sequence[Message], whole: str, index: int, at: re.Match[str], place: Callable[[int], str]
    ) -> int | None:
        """Where a turn's prompt ends in the conversation; None if that begins otherwise than prompt and answer."""
        prompt = self.render(placeholders(messages[:index]), True, place)
        answered = self.render(placeholders(messages[: index + 1]), False, place)
        is_kept = whole.startswith(prompt) and answered.startswith(whole[: at.end()])
        return len(prompt) if is_kept and len(prompt) <= at.start() else None

    def _keeps(self, messages: Sequence[Message], index: int, place: Callable[[int], str]) -> bool:
        """Whether the template writes the text of one message verbatim."""
        hidden = placeholders(messages)
        shown = [m if i == index else hidden[i] for i, m in enumerate(messages)]
        expected = self.render(hidden, False, place).replace(hidden[index].content, messages[index].content)
        return self.render(shown, False, place) == expected


def regions(stretches: Iterable[Stretch]) -> Iterator[list[Stretch]]:
    """Split a conversation at the borders of its turns."""
    region: list[Stretch] = []
    for stretch in stretches:
        if region and (stretch.turn != region[0].turn):
            yield region
            region = []
        region.append(stretch)
    if region:
        yield region


def placeholders(messages: Sequence[Message]) -> list[Message]:
    """The messages with the number of each in place of its text, between characters that no template writes."""
    return [Message(message.role, f"\ue000{index}\ue001") for index, message in enumerate(messages)]


def refused(
    problem: str, where: str, expected: str, *, found: str = "", fix: str = "leave the conversation out"
) -> DataError:
    """The error of a conversation that the template cannot render as it is trained; arguments as in ``DataError``."""
    return DataError(problem, where=where, found=found, expected=expected, fix=fix)
