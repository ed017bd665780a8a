r"""The chat formats of the GLM-4 family as data: how each writes messages, reasoning, calls and results.

A wording is text with markers and fields, as ``"\n<think>{reasoning}</think>"``. Its markers become control tokens if
the tokenizer has them; what fills a field is always plain text.

The rule that ``reasoning`` serves: what serving sends is context, what the model samples after it is trained.

=================  ==============================  ==========================================================
format             serving's prompt ends with      targets of a turn
=================  ==============================  ==========================================================
glm-4-9b-chat,     ``<|assistant|>``               ``\n`` answer, or name ``\n`` arguments; the next role's token
glm-4-0414
glm-z1-0414        ``<|assistant|>\n<think>``      reasoning ``</think>`` answer, the next role's token
glm-4.5 (and 4.6)  ``<|assistant|>``               ``\n<think>`` reasoning ``</think>\n`` answer and calls, next token
...not thinking    ``<|assistant|>\n<think></think>``  ``\n`` answer and calls, the next role's token
glm-4.7            ``<|assistant|><think>``        reasoning ``</think>`` answer and calls, the next role's token
...not thinking    ``<|assistant|></think>``       answer and calls, the next role's token
=================  ==============================  ==========================================================

Sources: the chat templates of the checkpoints, as in ggml-org/llama.cpp models/templates (GLM-4.6.jinja) and
huggingface/trl (glm4moe.jinja). GLM-Z1's template deletes all reasoning, so it does not say how a turn is trained:
white space around ``</think>`` follows the advice of THUDM/GLM-4 to begin with ``<think>\n``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

FormatName = Literal["glm-4-9b-chat", "glm-4-0414", "glm-z1-0414", "glm-4.5", "glm-4.7", "template"]
TEMPLATE: FormatName = "template"  # whatever the checkpoint's own chat template writes; see template_format
OPENED, CLOSED = "<think>", "</think>"
_WORDING = re.compile(r"(<[^<>{}\s]+>|/nothink)|\{(\w+)\}")


class Piece(NamedTuple):
    """A part of a rendered message.

    Args:
        text: The text, or a marker.
        is_marker: Whether it is a control token, if the tokenizer has it; else it is plain text.
    """

    text: str
    is_marker: bool = False


@dataclass(frozen=True)
class Reasoning:
    """How a format writes the reasoning of an assistant turn, after its header.

    Args:
        prompt: What serving sends to a model that shall think.
        thought: What the model then samples before its answer.
        skipped: What stands in place of reasoning, which serving sends too; "" where a turn without reasoning has
            nothing in its place, and is what no server asks for.
        switch: What serving writes behind the user's text if the model shall not think.
        can_be_kept: Whether serving can be told to keep the reasoning of earlier turns.
    """

    prompt: str
    thought: str
    skipped: str
    switch: str = ""
    can_be_kept: bool = False


@dataclass(frozen=True)
class TurnFormat:
    """One chat format.

    Args:
        architectures: The transformers classes of the checkpoints that use it.
        message: The body of a system or user message, and the answer of a turn.
        observation: The body of a tool's result.
        call: A tool call with the field ``arguments``, verbatim, or one ``argument`` after the other.
        argument: One argument of a call; "" where arguments are written verbatim.
        systems_first: Whether system messages are moved to the front.
        stripped: The roles whose text loses white space at both ends.
        cut: Whether every text loses what stands before its last ``</think>``.
        reasoning: How reasoning is written; None in a format without.
    """

    architectures: tuple[str, ...]
    message: str = "\n{text}"
    observation: str = "\n{text}"
    call: str = "{name}\n{arguments}"
    argument: str = ""
    systems_first: bool = False
    stripped: frozenset[str] = frozenset()
    cut: bool = False
    reasoning: Reasoning | None = None

    @property
    def joins(self) -> bool:
        """Whether text and calls of one generation are one turn, and results that follow each other one message."""
        return bool(self.argument)

    @property
    def needed_markers(self) -> tuple[str, ...]:
        """The markers that must be control tokens: all of a format that writes calls with markers."""
        if not self.argument:
            return ()
        reasoning = (self.reasoning.prompt, self.reasoning.thought, self.reasoning.skipped) if self.reasoning else ()
        wordings = (*reasoning, self.call, self.argument, self.observation)
        return tuple(dict.fromkeys(p.text for wording in wordings for p, _ in _parsed(wording) if p.is_marker))

    def text_of(self, role: str, text: str) -> str:
        """The text of a message as the format writes it."""
        return text.strip() if role in self.stripped else text

    def call_pieces(self, name: str, arguments: str) -> list[Piece]:
        """Write a tool call.

        Args:
            name: The tool's name.
            arguments: The arguments, JSON with an object where the format writes one after the other.
        Raises:
            ValueError: If the arguments are no JSON object where one is needed.
        """
        if not self.argument:
            return pieces(self.call, name=name, arguments=self.text_of("assistant", arguments))
        given = json.loads(arguments, parse_constant=_refuse)
        if not isinstance(given, dict):
            raise ValueError("it is no object")
        before, after = self.call.split("{arguments}")
        written = [p for key, value in given.items() for p in pieces(self.argument, key=key, value=_as_text(value))]
        return [*pieces(before, name=name), *written, *pieces(after)]


FORMATS: dict[FormatName, TurnFormat] = {
    "glm-4-9b-chat": TurnFormat(("GlmForCausalLM",)),
    "glm-4-0414": TurnFormat(("Glm4ForCausalLM",), systems_first=True),
    "glm-z1-0414": TurnFormat(
        ("Glm4ForCausalLM",),
        systems_first=True,
        stripped=frozenset({"system", "user", "assistant", "observation"}),
        cut=True,
        reasoning=Reasoning(prompt="\n<think>", thought="\n{reasoning}\n</think>\n", skipped=""),
    ),
    "glm-4.5": TurnFormat(
        ("Glm4MoeForCausalLM",),
        observation="\n<tool_response>\n{text}\n</tool_response>",
        call="\n<tool_call>{name}\n{arguments}</tool_call>",
        argument="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
        stripped=frozenset({"assistant"}),
        reasoning=Reasoning(
            prompt="", thought="\n<think>{reasoning}</think>", skipped="\n<think></think>", switch="/nothink"
        ),
    ),
    "glm-4.7": TurnFormat(
        ("Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"),
        message="{text}",
        observation="<tool_response>{text}</tool_response>",
        call="<tool_call>{name}{arguments}</tool_call>",
        argument="<arg_key>{key}</arg_key><arg_value>{value}</arg_value>",
        stripped=frozenset({"assistant"}),
        reasoning=Reasoning(prompt="<think>", thought="{reasoning}</think>", skipped="</think>", can_be_kept=True),
    ),
}


def pieces(wording: str, **fields: str) -> list[Piece]:
    """Fill the fields of a wording.

    Args:
        wording: Text with markers and fields in braces.
        fields: The text of each field.
    Returns:
        The parts in order; empty texts are left out.
    """
    found = (Piece(fields[name]) if name else piece for piece, name in _parsed(wording))
    return [piece for piece in found if piece.text]


def split_reasoning(content: str) -> tuple[str, str]:
    """Split an answer that holds its reasoning in tags, as the family's templates do.

    Args:
        content: The text of an assistant message.
    Returns:
        Reasoning and answer; no reasoning if there is no ``</think>``.
    Raises:
        ValueError: If text would be lost: the tags do not stand once and at the beginning.
    """
    if CLOSED not in content:
        return "", content
    before, _, answer = content.partition(CLOSED)
    start, _, reasoning = before.rpartition(OPENED)
    if CLOSED in answer or start.strip():
        raise ValueError("the tags do not enclose the beginning of the text")
    return reasoning.strip("\n"), answer.lstrip("\n")


def merged(parts: Sequence[Piece], tokens: frozenset[str]) -> Iterator[Piece]:
    """Join neighbouring texts, which are encoded as one; a marker that the tokenizer does not have is text.

    Args:
        parts: The parts of a message.
        tokens: The markers that the tokenizer has.
    """
    waiting = ""
    for part in parts:
        if not (part.is_marker and part.text in tokens):
            waiting += part.text
            continue
        if waiting:
            yield Piece(waiting)
        yield part
        waiting = ""
    if waiting:
        yield Piece(waiting)


@functools.cache
def _parsed(wording: str) -> tuple[tuple[Piece, str], ...]:
    """The literal parts of a wording, each with ""; fields are empty parts with their name."""
    found, end = list[tuple[Piece, str]](), 0
    for match in _WORDING.finditer(wording):
        found.append((Piece(wording[end : match.start()]), ""))
        found.append((Piece(match[1] or "", bool(match[1])), match[2] or ""))
        end = match.end()
    return (*found, (Piece(wording[end:]), ""))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")
