"""The declaration of tools at the beginning of a row, rendered by the checkpoint's own chat template.

Its wording belongs to the checkpoint and is never restated here. The template's own markers, as in the example of a
call that GLM-4.5 is shown, are control tokens; the same text in a tool's description is not.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from glm4ft.data.control_tokens import HEADERS, PREFIX
from glm4ft.data.time_limit import TEMPLATE_LIMIT_S, within
from glm4ft.data.turn_format import Piece, TurnFormat
from glm4ft.errors import ModelError


def tool_block(tokenizer: PreTrainedTokenizerBase, turn_format: TurnFormat, tools: Sequence[Any]) -> tuple[Piece, ...]:
    """Render what follows ``<|system|>`` in a row with tools.

    Args:
        tokenizer: The checkpoint's tokenizer, with its chat template.
        turn_format: The chat format, which writes the message after the block.
        tools: The declared tools.
    Returns:
        The text and the markers of the block.
    Raises:
        ModelError: If there is no template, it fails, or it does not render the tools.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "the conversation declares tools, but the tokenizer has no chat template to render them",
            where=str(tokenizer.name_or_path),
            fix="use a tokenizer folder that holds the checkpoint's chat_template.jinja",
        )
    markers = re.compile("|".join(sorted(map(re.escape, tokenizer.get_added_vocab()), key=len, reverse=True)))
    shield = _absent(json.dumps(tools))
    # a marker in a tool's text is broken in two, and mended after the template's own markers have been found
    shielded = _map_texts(list(tools), lambda text: markers.sub(lambda m: m[0][:1] + shield + m[0][1:], text))
    body = _render_body(tokenizer, turn_format, shielded)
    parts, end = list[Piece](), 0
    for match in markers.finditer(body):
        parts += [Piece(body[end : match.start()].replace(shield, "")), Piece(match[0], is_marker=True)]
        end = match.end()
    parts.append(Piece(body[end:].replace(shield, "")))
    return tuple(part for part in parts if part.text)


def _render_body(tokenizer: PreTrainedTokenizerBase, turn_format: TurnFormat, tools: list[Any]) -> str:
    probe = {"role": "user", "content": "probe"}
    start = "".join(PREFIX) + HEADERS["system"]
    end = HEADERS["user"] + turn_format.message.format(text="probe")
    on_message: list[dict[str, Any]] = [{"role": "system", "content": "", "tools": tools}, probe]
    as_argument: list[dict[str, Any]] = [probe]
    for messages, argument in ((on_message, None), (as_argument, tools)):
        text = _render(tokenizer, messages, argument)
        body = text[len(start) : -len(end)]
        if text.startswith(start) and text.endswith(end) and all(_is_named(tool, body) for tool in tools):
            return body
    raise ModelError(
        "the checkpoint's chat template does not render tools as this chat format expects",
        where=str(tokenizer.name_or_path),
        found=repr(text[:200]),
        expected=f"{start}, the tools, then {end!r}",
        fix="check the chat template, or choose another --chat_format",
    )


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: Any) -> str:
    try:
        render = functools.partial(tokenizer.apply_chat_template, messages, tools=tools, tokenize=False)
        return str(within(TEMPLATE_LIMIT_S, render))
    except Exception as error:  # a template is a program and can raise anything
        raise ModelError(
            "the checkpoint's chat template fails on the conversation's tools",
            where=str(tokenizer.name_or_path),
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix="check the chat template, and whether the tools are of the form that it expects",
        ) from error


def _is_named(tool: dict[str, Any], body: str) -> bool:
    """Whether the text names the tool, plainly or within JSON."""
    name = str(tool.get("function", tool).get("name", tool.get("type", "")))
    return any(form in body for form in (name, json.dumps(name)[1:-1], json.dumps(name, ensure_ascii=False)[1:-1]))


def _absent(text: str) -> str:
    """A word of ASCII letters that does not occur in a text, so that no escaping changes it."""
    word = "shield"
    while word in text:
        word += "x"
    return word


def _map_texts(value: Any, change: Any) -> Any:
    """Copy a JSON value with every text in it changed, keys included."""
    if isinstance(value, dict):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
