"""Calls that are written into the text of an answer, in any of the ways that other formats write them.

As text a call is trained as a plain answer: the token after the header is a newline, so a server never sees a call.
A text is taken for a call only if it names a declared tool and ends with what looks like its arguments.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from glm4ft.data.json_values import STRICT, is_array

_MAX_TRIES = 16  # places in a text at which JSON may begin
_NAME_KEYS = ("name", "tool", "tool_name", "function", "action", "recipient_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input", "action_input", "tool_input", "params")
# What other formats write around a call: tags, brackets, code fences.
_TAG = r"</?\|?[\w.=\" -]{1,40}\|?>|<\|[^|>\n]{1,40}\|>|\[/?[A-Z_]{3,20}\]|```\w*|functools|\[|\]"
_OPENERS = re.compile(rf"(?:\s*(?:{_TAG}|(?:Action|Tool|Function|Call)\s*:))*\s*\Z")
_ENDS = re.compile(rf"\s*(?:(?:{_TAG})\s*)*\Z")


class WrittenCall(NamedTuple):
    """A call in a text: the tool, and the arguments as text; None if they cannot be read as JSON."""

    name: str
    arguments: str | None


class WrittenCalls(NamedTuple):
    """The calls that a text ends with, and the text before them."""

    before: str
    calls: tuple[WrittenCall, ...]


def find_written_calls(content: str, names: Sequence[str]) -> WrittenCalls | None:
    """Find the calls that an answer ends with.

    Args:
        content: The text of the answer.
        names: The names of the declared tools.
    Returns:
        The calls, or None if the text is a plain answer.
    """
    named = [name for name in names if name in content]
    if not named:
        return None
    longest_first = sorted(named, key=len, reverse=True)
    for find in (_as_json, _as_tags, _as_glm, _as_code, _as_action):
        if (found := find(content, longest_first)) is not None:
            return found
    return None


def _as_json(content: str, names: list[str]) -> WrittenCalls | None:
    """An object with the name and the arguments, or a list of them: Hermes, Llama 3, Mistral, Glaive."""
    found, start, end = list[WrittenCall](), -1, 0
    for tries, match in enumerate(re.finditer(r"[\[{]", content)):
        if tries >= _MAX_TRIES:
            break
        if match.start() < end:
            continue
        try:
            value, stop = STRICT.raw_decode(content, match.start())
        except (ValueError, RecursionError):
            continue
        if calls := tuple(_calls_in(value, names)):
            start = match.start() if start < 0 else start
            found += calls
        end = stop if calls else end
    if found and _ENDS.match(content, end):
        return WrittenCalls(_text_before(content[:start]), tuple(found))
    quote = "[\"']"
    key = rf"{quote}(?:{'|'.join(_ARGUMENT_KEYS)}){quote}"
    loose = re.search(rf"\{{\s*{quote}name{quote}\s*:\s*{quote}(?P<name>{_any(names)}){quote}\s*,\s*{key}\s*:", content)
    if loose and _ENDS.match(content, content.rfind("}") + 1):  # arguments that are no JSON
        return WrittenCalls(_text_before(content[: loose.start()]), (WrittenCall(loose["name"], None),))
    return None


def _calls_in(value: Any, names: list[str]) -> Iterator[WrittenCall]:
    if isinstance(value, Mapping) and is_array(value.get("tool_calls")):
        value = value["tool_calls"]
    for entry in value if is_array(value) else [value]:
        if not isinstance(entry, Mapping):
            return
        inner = entry.get("function")
        call = inner if isinstance(inner, Mapping) else entry
        if len(call) == 1 and isinstance(next(iter(call.values())), Mapping):  # {"find": {"city": "Bonn"}}
            call = {"name": next(iter(call)), "arguments": next(iter(call.values()))}
        name = next((call[key] for key in _NAME_KEYS if isinstance(call.get(key), str)), None)
        arguments = next((call[key] for key in _ARGUMENT_KEYS if key in call), None)
        if name not in names or arguments is None:
            return
        yield WrittenCall(name, arguments if isinstance(arguments, str) else _json(arguments))


def _as_glm(content: str, names: list[str]) -> WrittenCalls | None:
    """The name and the arguments behind it: on the next line as GLM-4 renders calls, or on the same before a brace."""
    pattern = rf"(?P<name>{_any(names)})[`*]*(?:[ \t]*(?P<newline>\r?\n)|\s*[:：]?\s*(?=\{{)|\s*\(\s*(?=\{{)|\s*\Z)"
    for match in re.finditer(rf"(?:\A|(?<=[\n>\]`*\s])){pattern}", content):
        before = content[: match.start()].rstrip("`* ")
        arguments, has_json = _leading_json(re.sub(r"\A\s*```\w*\s*", "", content[match.end() :]).strip())
        if _OPENERS.match(before) or (has_json and before.endswith("\n")):
            return WrittenCalls(_text_before(before), (WrittenCall(match["name"], arguments),))
    return None


def _leading_json(text: str) -> tuple[str | None, bool]:
    """The arguments in the text after a name, and whether they are an object that the text ends with."""
    try:
        value, end = STRICT.raw_decode(text)
    except (ValueError, RecursionError):
        plain = _ENDS.sub("", text)
        return (plain if plain else "{}"), False
    return text[:end], isinstance(value, Mapping) and _ENDS.match(text[end:].lstrip(")")) is not None


def _as_code(content: str, names: list[str]) -> WrittenCalls | None:
    """An expression of Python: ``name(x=1)``, or a list of them (Llama, ToolACE)."""
    match = re.search(rf"(?:\A|(?<=[\n>\]`\[\s]))\[?\s*(?:{_any(names)})\(", content)
    if not match:
        return None
    before, text = content[: match.start()], _ENDS.sub("", content[match.start() :].strip().strip("[]`"))
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            body = ast.parse(f"[{text}]", mode="eval").body
        calls = tuple(_code_call(node, names) for node in body.elts) if isinstance(body, ast.List) else ()
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    is_alone = _OPENERS.match(before) is not None or before.rstrip(" `").endswith("\n")
    return WrittenCalls(_text_before(before), calls) if calls and is_alone else None


def _code_call(node: ast.expr, names: list[str]) -> WrittenCall:
    if not isinstance(node, ast.Call) or (name := ast.unparse(node.func)) not in names:
        raise ValueError("no call of a declared tool")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        return WrittenCall(name, None)
    try:
        return WrittenCall(name, _json({str(word.arg): ast.literal_eval(word.value) for word in node.keywords}))
    except ValueError:
        return WrittenCall(name, None)


def _as_tags(content: str, names: list[str]) -> WrittenCalls | None:
    """Tags with the name in them: Llama 3.1, GLM-4.5, Claude."""
    opening = r"<(?:function=|invoke\s+name=[\"']?|tool_call>\s*|tool\s+name=[\"']?)"
    match = re.search(rf"{opening}(?P<name>{_any(names)})\b[\"']?>?", content)
    if not match:
        return None
    rest, pairs = (
        content[match.end() :],
        re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", content),
    )
    arguments = _json({key: _value(value) for key, value in pairs}) if pairs else None
    if not pairs and _leading_json(rest.strip())[1]:
        arguments = _leading_json(rest.strip())[0]
    return WrittenCalls(_text_before(content[: match.start()]), (WrittenCall(match["name"], arguments),))


def _as_action(content: str, names: list[str]) -> WrittenCalls | None:
    """The lines of a ReAct prompt."""
    match = re.search(rf"(?m)^\s*Action\s*:\s*(?P<name>{_any(names)})\s*\n+\s*Action Input\s*:\s*(?P<rest>.*)", content)
    if not match:
        return None
    arguments, is_json = _leading_json(content[match.start("rest") :].strip())
    call = WrittenCall(match["name"], arguments if is_json else None)
    return WrittenCalls(_text_before(content[: match.start()]), (call,))


def _any(names: list[str]) -> str:
    return "|".join(map(re.escape, names))


def _text_before(text: str) -> str:
    """The text before a call, without what opens the call."""
    while (shorter := re.sub(rf"(?:{_TAG}|(?:Action|Tool|Function)\s*:)\s*\Z", "", text).rstrip()) != text:
        text = shorter
    return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
