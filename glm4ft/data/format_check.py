"""Chooses the chat format of a checkpoint, and compares it with the checkpoint's own chat template.

A format that is guessed wrong trains rows that serving never sends, and no loss shows it. So short conversations are
rendered by both, and they must give the same ids.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.control_tokens import HEADERS, common_prefix_length
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.time_limit import TEMPLATE_LIMIT_S, within
from glm4ft.data.turn_format import FORMATS, OPENED, FormatName
from glm4ft.errors import ModelError, show

_TURNS = (
    Message("system", "Answer in one sentence."),
    Message("user", "What is the capital of France?"),
    Message("assistant", "It is Paris.\n\n首都是巴黎。"),
    Message("user", "  And of Spain?"),
)
_CALLS = (
    Message("user", "Weather in Paris and Rome?"),
    Message("assistant", "I ask.", reasoning="Two cities."),
    Message("assistant", '{"city": "Paris", "days": 2}', "get_weather", continues=True),
    Message("assistant", '{"city": "Rome"}', "get_weather", continues=True),
    Message("observation", "31 degrees"),
    Message("observation", "33 degrees"),
    Message("assistant", "Both are hot.", reasoning="Over 30."),
)
_CALL = (
    Message("user", "Weather in Paris?"),
    Message("assistant", '{"city": "Paris"}', "get_weather"),
    Message("observation", "31 degrees"),
)
_LATE_SYSTEM = (Message("user", "One."), Message("system", "Be short."), Message("user", "Two."))


@dataclass(frozen=True)
class Difference:
    """The first place at which the template and the format disagree.

    Args:
        of: What was rendered, in words.
        position: The position of the first different id.
        template: What the template has there.
        format: What the format has there.
    """

    of: str
    position: int
    template: str
    format: str

    def __str__(self) -> str:
        return f"{self.of}: at position {self.position} the template has {self.template}, the format {self.format}"


def detect_format(architectures: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, where: str = "") -> FormatName:
    """Choose the chat format of a checkpoint: of those that its architecture knows, the one that its template writes.

    Args:
        architectures: The architectures in the checkpoint's ``config.json``.
        tokenizer: Its tokenizer, with its chat template if it has one.
        where: The checkpoint, for error messages.
    Returns:
        The name of the format; if none agrees with the template, the nearest one.
    Raises:
        ModelError: If the architecture is not known, or leaves a choice that only a template could make.
    """
    known = [name for name, known in FORMATS.items() if set(architectures) & set(known.architectures)]
    if not known:
        raise ModelError(
            "no chat format is known for this architecture",
            where=where,
            found=", ".join(architectures) or "no architectures in config.json",
            expected=" or ".join(dict.fromkeys(a for f in FORMATS.values() for a in f.architectures)),
            fix="use a checkpoint of the GLM-4 family",
        )
    if not tokenizer.chat_template:
        # GLM-4-0414 and GLM-Z1 have one architecture; a base without a template is GLM-4-0414's
        plain = [name for name in known if FORMATS[name].reasoning is None] or known
        if len(plain) > 1:
            raise ModelError(
                "the checkpoint has no chat template, and its architecture has several chat formats",
                where=where, found=", ".join(architectures), expected=" or ".join(plain),
                fix=f"copy the checkpoint's chat_template.jinja, or name the format: --chat_format {plain[0]}",
            )  # fmt: skip
        return plain[0]
    differences = {name: _first_difference(name, tokenizer) for name in known}
    return max(known, key=lambda name: _agreement(differences[name]))


def require_agreement(name: FormatName, tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """Compare a chat format with the checkpoint's own template, if it has one.

    Args:
        name: The format.
        tokenizer: The checkpoint's tokenizer.
        where: The checkpoint, for the message.
    Raises:
        ModelError: If the two disagree; the message names both.
    """
    difference = _first_difference(name, tokenizer) if tokenizer.chat_template else None
    if difference is None:
        return
    agreeing = [other for other in FORMATS if other != name and _first_difference(other, tokenizer) is None]
    raise ModelError(
        f"the checkpoint's own chat template contradicts the chat format {name}{_known_reason(name, tokenizer)}",
        where=where,
        found=str(difference),
        expected=f"the ids of {name} from the template too: a server sends what the template writes",
        fix=f"name the format that agrees with the template: --chat_format {agreeing[0]}"
        if agreeing
        else "use a checkpoint of a known format; --force_format true would train rows that no server sends",
    )


def format_warnings(name: FormatName, tokenizer: PreTrainedTokenizerBase, *, where: str) -> list[str]:
    """Sentences about a chat format that is used although its checkpoint's template does not bear it out.

    Args:
        name: The format.
        tokenizer: The checkpoint's tokenizer.
        where: The checkpoint.
    """
    if not tokenizer.chat_template:
        return [
            f"{where}: it has no chat template, so what is trained or merged from it has none either, and no server "
            "can render a prompt with it: put the chat_template.jinja of a matching chat checkpoint beside the weights"
        ]
    difference = _first_difference(name, tokenizer)
    if difference is None and not FORMATS[name].joins:  # only some data has these
        probes = (("a tool call", _CALL), ("a system message in the middle", _LATE_SYSTEM))
        found = (_compare(ChatFormat(name, tokenizer), of, messages) for of, messages in probes)
        difference = next(filter(None, found), None)
    return [f"{where}: its chat template contradicts the chat format {name}: {difference}"] if difference else []


def _known_reason(name: FormatName, tokenizer: PreTrainedTokenizerBase) -> str:
    text = _rendered(tokenizer, [_as_dict(m, "tool") for m in _TURNS], add_generation_prompt=True, tokenize=False)
    if not isinstance(text, str):
        return ""
    if text.startswith(HEADERS["system"]):
        return " (it begins without [gMASK]<sop>, as GLM-Edge's, which is not supported)"
    if OPENED in text and FORMATS[name].reasoning is None:
        return f" (it asks for reasoning with {OPENED}, as GLM-Z1's)"
    return ""


def _agreement(difference: Difference | None) -> tuple[bool, int]:
    return difference is None, difference.position if difference else 0


def _first_difference(name: FormatName, tokenizer: PreTrainedTokenizerBase) -> Difference | None:
    try:
        chat_format = ChatFormat(name, tokenizer)
    except ModelError as error:  # a token of the format is missing
        return Difference("the tokenizer", 0, error.found, "tokens of its own for all its markers")
    return next(_differences(chat_format), None)


def _differences(chat_format: ChatFormat) -> Iterator[Difference]:
    """Yield what differs of a prompt, of one without thinking, and of turns with reasoning and calls."""
    reasoning = chat_format.turn_format.reasoning
    probes: list[tuple[str, Sequence[Message], dict[str, Any]]] = [("a prompt", _TURNS, {})]
    if reasoning and reasoning.skipped:
        probes.append(("a prompt without thinking", _TURNS, {"enable_thinking": False}))
        probes.append(("turns with reasoning and calls", _CALLS, {}))
    for of, messages, options in probes:
        difference = _compare(chat_format, of, messages, **options)
        if difference:
            yield difference


def _compare(chat_format: ChatFormat, of: str, messages: Sequence[Message], **options: Any) -> Difference | None:
    is_prompt = messages[-1].role != "assistant"
    theirs = _rendered(
        chat_format.tokenizer, as_template_messages(chat_format, messages), add_generation_prompt=is_prompt, **options
    )
    if is_prompt:
        ours = chat_format.prompt(messages, thinking=options.get("enable_thinking", True))
    else:
        ours = chat_format.encode(Conversation(tuple(messages))).input_ids[:-1]
    if theirs == ours:
        return None
    if isinstance(theirs, str):
        return Difference(of, 0, f"an error: {theirs}", "a row")
    first = common_prefix_length(ours, theirs)
    decode = chat_format.tokenizer.decode
    there, here = (show(str(decode(ids[first : first + 4]))) if ids[first:] else "nothing" for ids in (theirs, ours))
    return Difference(of, first, there, here)


def as_template_messages(chat_format: ChatFormat, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Write messages in the form that the checkpoint's chat template accepts.

    Args:
        chat_format: The chat format.
        messages: The messages of a conversation.
    Returns:
        Messages with ``reasoning_content`` and ``tool_calls`` where the format has them, else with ``metadata``.
    """
    joins, found = chat_format.turn_format.joins, list[dict[str, Any]]()
    for message in messages:
        if not (joins and message.is_call):
            found.append(_as_dict(message, "tool" if joins else "observation"))
            continue
        if not message.continues or not found:
            found.append({"role": "assistant", "content": ""} | _reasoning(message))
        call = {"name": message.metadata, "arguments": json.loads(message.content)}
        found[-1].setdefault("tool_calls", []).append({"type": "function", "function": call})
    return found


def _as_dict(message: Message, result_role: str) -> dict[str, Any]:
    role = result_role if message.role == "observation" else message.role
    metadata = {"metadata": message.metadata} if result_role == "observation" else {}
    return {"role": role, "content": message.content} | metadata | _reasoning(message)


def _reasoning(message: Message) -> dict[str, Any]:
    return {"reasoning_content": message.reasoning} if message.reasoning else {}


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> Any:
    """The ids that the template gives, or as a text what went wrong."""
    try:
        render = functools.partial(tokenizer.apply_chat_template, messages, **{"return_dict": False, **options})
        return within(TEMPLATE_LIMIT_S, render)
    except Exception as error:  # a template is a program and can raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
