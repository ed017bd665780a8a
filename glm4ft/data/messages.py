"""Lists of messages in every spelling that is in use, as turns with their places in the record.

Sources of the spellings: GLM-4's finetune_demo and ChatGLM3's; OpenAI's chat format and the items of its Responses;
ShareGPT as LLaMA-Factory and axolotl read it; ms-swift's messages and conversation pairs; XTuner's pairs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

from glm4ft.data.conversation import Role
from glm4ft.data.json_values import is_array, listed, says_nothing
from glm4ft.data.known_keys import (
    CONTENT_KEYS,
    LOSS_KEYS,
    REASONING,
    REASONING_KEYS,
    RESULT_ID_KEYS,
    USED_ABOUT_TOOLS,
    USED_IN_MESSAGE,
    refuse_lost_meaning,
    refused,
    unknown_keys,
)
from glm4ft.data.source_message import SourceMessage, name_of, text_of
from glm4ft.data.tool_calls import call_id, calls_in_json, read_call, read_calls, read_tools
from glm4ft.errors import Location

OBSERVATION: Role = "observation"
_CALLS = ("function_call", "tool_call", "function-call", "tool-call")  # roles whose text is a call as JSON
_RESULTS = ("tool", "function", "tool_response", "function_response", "tool-response", "function-response")
ROLES: dict[str, Role] = (
    {role: role for role in get_args(Role)}
    | {"developer": "system", "human": "user", "prompter": "user"}
    | dict.fromkeys(("gpt", "chatgpt", "model", "bot", "bing", "bard", *_CALLS), "assistant")
    | dict.fromkeys((*_RESULTS, "tool_result", "tool_results", "ipython"), OBSERVATION)
)
# An item of a list may also hold a question with its answer, with the system prompt beside the first.
PAIRS = (
    ("human", "assistant"), ("human", "gpt"), ("user", "assistant"), ("input", "output"), ("query", "response"),
    ("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"),
)  # fmt: skip
# A bool, 1 and 1.0 are one dictionary key in Python, so True and False stand for the numbers as well.
_TRUE, _FALSE = (True, "true", "yes", "on", "y", "t", "1"), (False, "false", "no", "off", "n", "f", "0", "")
LOSS_FLAGS: dict[object, bool] = dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False)


def is_message(value: Any) -> bool:
    """Whether a value looks like a message or a pair, so that a list of it is a conversation and no list of records."""
    if not isinstance(value, Mapping):
        return False
    return value.get("role") is not None or value.get("from") is not None or _type(value) in _ITEMS


def read_messages(messages: Any, place: Location) -> list[SourceMessage]:
    """Read a list of messages, or a JSON string that holds one.

    Args:
        messages: The list.
        place: Its place in the record.
    Raises:
        DataError: If it is no list, or a message cannot be read.
    """
    messages = listed(messages, place)
    if not is_array(messages) or not messages:
        state = "missing" if messages is None else "empty" if is_array(messages) else "not a list"
        raise place.wrong(f"{place.field or 'the list'} is {state}", messages, "a list of at least one message")
    turns = list[SourceMessage]()
    for index, message in enumerate(messages):
        for turn in _message(message, place.item(index)):
            goes_on = bool(turns) and turns[-1].role == turn.role == "assistant" and _is_call_alone(message)
            turns.append(replace(turn, continues=True) if goes_on else turn)
    return turns


def _is_call_alone(message: Any) -> bool:
    """Whether an item of a list is a call with a role or type of its own, so that it goes on with what is before it.

    Nobody prompts a model anew between its text and its call, or between two calls.
    """
    if not isinstance(message, Mapping):
        return False
    return (message.get("role") or message.get("from")) in _CALLS or _type(message) == "function_call"


def unknown_keys_of(messages: Any, name: str) -> Iterator[str]:
    """The keys of messages that are not used, each with the name of the list before it."""
    for message in messages if is_array(messages) else ():
        if isinstance(message, Mapping):
            pair = _pair(message)
            used = USED_ABOUT_TOOLS if _is_about_a_tool(message) else USED_IN_MESSAGE
            used = frozenset((*pair, "system", *LOSS_KEYS)) if pair else used
            yield from (f"{name}[*].{key}" for key in unknown_keys(message, used))


def _is_about_a_tool(message: Mapping[str, Any]) -> bool:
    return ROLES.get(str(message.get("role") or message.get("from"))) == OBSERVATION or _type(message) in _ITEMS


def _message(message: Any, place: Location) -> Iterator[SourceMessage]:
    """Read one message as one turn, or as several if it holds tool calls or is a pair."""
    if is_array(message) and len(message) == 2:
        yield from _tuple(message[0], message[1], place)
        return
    if not isinstance(message, Mapping):
        raise place.wrong("a message is not an object", message, "an object with role and content")
    is_answer = ROLES.get(str(message.get("role") or message.get("from"))) == "assistant"
    refuse_lost_meaning(message, place, used=REASONING_KEYS if is_answer else ())
    if _type(message) in _ITEMS and message.get("role") is None:
        yield _item(message, place)
    elif pair := _pair(message):
        yield from _pair_turns(message, pair, place)
    else:
        yield from _turns(message, place)


def _turns(message: Mapping[str, Any], place: Location) -> Iterator[SourceMessage]:
    role_key, content_key = _keys(message, place)
    role = _role(message, place, role_key)
    if message.get(role_key) == "tool" and message.get("observation") is not None:
        yield from _call_with_result(message, place)
        return
    loss, metadata = _loss(message, place), _metadata(message, role, place)
    tools = read_tools(message["tools"], place.key("tools")) if message.get("tools") is not None else ()
    content, at = message.get(content_key), place.key(content_key)
    calls = list(read_calls(message, role, place))
    if message.get(role_key) in _CALLS:
        calls, content = [*calls_in_json(content, at), *calls], None
    if calls and metadata:
        raise place.key("metadata").wrong("a message names its tool twice", metadata, "metadata or calls, not both")
    text = text_of(content, at, may_be_empty=bool(calls or tools or role == OBSERVATION))
    turns = [replace(call, loss=loss) for call in calls]
    if text or not calls:
        turn = SourceMessage(role, text, place, metadata, loss, tools)
        if metadata or role == OBSERVATION:
            turn = replace(
                turn,
                call_id=call_id(message, RESULT_ID_KEYS),
                answers="" if metadata else str(message.get("name") or ""),
            )
        turns.insert(0, turn)
    reasoning = _reasoning(message, place) if role == "assistant" else ""
    yield replace(turns[0], reasoning=reasoning) if reasoning else turns[0]
    yield from (replace(call, continues=True) for call in turns[1:])


def _keys(message: Mapping[str, Any], place: Location) -> tuple[str, str]:
    """Return the keys of the role and of the content."""
    has_role, has_from = message.get("role") is not None, message.get("from") is not None
    if has_role and has_from:
        raise place.key("from").wrong("a message has two roles", list(message), "from/value or role/content")
    given = [key for key in CONTENT_KEYS if message.get(key) is not None]
    if len(given) > 1:
        raise place.key(given[1]).wrong("a message has two texts", list(message), "from/value or role/content")
    natural = next((key for key in CONTENT_KEYS if key in message), "value" if has_from else "content")
    return "from" if has_from else "role", given[0] if given else natural


def _role(message: Mapping[str, Any], place: Location, key: str) -> Role:
    value = message.get(key)
    if isinstance(value, str) and value in ROLES:
        return ROLES[value]
    at, expected = place.key(key), "system, user, assistant, observation, tool, tool_call, human, gpt and the like"
    if value is None:
        raise at.wrong("a message has no role", list(message), f"{key}: {expected}", f"add the key {key}")
    word = value[:40].strip().lower() if isinstance(value, str) else ""
    # a hint may name another spelling of the same role, never another role: 'tools' may well declare them
    guesses = [role for role in ROLES if role not in ("tool", "function")]
    near = [word] if word in ROLES else difflib.get_close_matches(word, guesses, n=1, cutoff=0.8)
    fix = f"did you mean {near[0]!r}?" if near else "rename the role; --columns role=KEY names another key of roles"
    raise at.wrong("a message has an unknown role", value, expected, fix)


def _loss(message: Mapping[str, Any], place: Location) -> bool | None:
    """Read the message's loss flag, under any of its names."""
    # columnar data sets fill missing values with null
    flags = {key: _flag(message[key], place.key(key)) for key in LOSS_KEYS if message.get(key) is not None}
    if len(set(flags.values())) > 1:
        raise place.key(list(flags)[-1]).wrong("a message has two loss flags that disagree", flags, "one of the two")
    return next(iter(flags.values()), None)


def _reasoning(message: Mapping[str, Any], place: Location) -> str:
    """Read what the assistant thought, under any of its names."""
    given = {key: message[key] for key in REASONING_KEYS if not says_nothing(message.get(key))}
    texts = {key: text_of(value, place.key(key)) for key, value in given.items()}
    if len(set(texts.values())) > 1:
        raise place.key(list(texts)[-1]).wrong("a message has two texts of reasoning that differ", texts, "one of them")
    return next(iter(texts.values()), "")


def _flag(value: Any, place: Location) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, (str, int, float)) and word in LOSS_FLAGS:
        return LOSS_FLAGS[word]
    raise place.wrong("a loss flag is neither true nor false", value, "true or false (or 1 or 0)")


def _metadata(message: Mapping[str, Any], role: Role, place: Location) -> str:
    value = message.get("metadata")
    if value is None or value == "":
        return ""
    if role != "assistant":
        fix = "remove it: metadata names the tool that an assistant turn calls"
        raise place.key("metadata").wrong(f"metadata on a message of role {role}", value, "no metadata", fix)
    return name_of(value, place.key("metadata"))


# --- other spellings ------------------------------------------------------------------------------------------------

_ITEMS = ("function_call", "function_call_output", "reasoning")  # of OpenAI's Responses, which have no role


def _type(message: Mapping[str, Any]) -> str:
    kind = message.get("type")
    return kind if isinstance(kind, str) else ""


def _item(item: Mapping[str, Any], place: Location) -> SourceMessage:
    """Read an item of OpenAI's Responses that is no message."""
    if item["type"] == "reasoning":
        raise refused(REASONING, item, place)
    if item["type"] == "function_call":
        loss = _loss(item, place)
        named = {"call_id": item.get("call_id") or item.get("id")}
        return replace(read_call({**item, "id": None, **named}, place), loss=loss)
    text = text_of(item.get("output"), place.key("output"), may_be_empty=True)
    return SourceMessage(OBSERVATION, text, place, call_id=str(item.get("call_id") or ""))


def _tuple(first: Any, second: Any, place: Location) -> Iterator[SourceMessage]:
    """Read a role with its text, as LangChain writes it, or a question with its answer, as in a history."""
    if isinstance(first, str) and first in ROLES and first not in _CALLS:
        text = text_of(second, place.item(1), may_be_empty=ROLES[first] == OBSERVATION)
        yield SourceMessage(ROLES[first], text, place)
    else:
        yield SourceMessage("user", text_of(first, place.item(0)), place.item(0))
        yield SourceMessage("assistant", text_of(second, place.item(1)), place.item(1))


def _call_with_result(message: Mapping[str, Any], place: Location) -> Iterator[SourceMessage]:
    """Read ChatGLM3's tool message, which holds a call with its result."""
    yield replace(read_call(message, place), loss=_loss(message, place))
    yield SourceMessage(OBSERVATION, text_of(message["observation"], place.key("observation")), place)


def _pair(message: Mapping[str, Any]) -> tuple[str, str] | None:
    if message.get("role") is not None or message.get("from") is not None:
        return None
    found = next((pair for pair in PAIRS if all(message.get(key) is not None for key in pair)), None)
    if found is None and len(message) == 1 and (key := next(iter(message))) in ROLES and key not in _CALLS:
        return (key, "")  # {"user": "..."}: the role is the key
    return found


def _pair_turns(message: Mapping[str, Any], pair: tuple[str, str], place: Location) -> Iterator[SourceMessage]:
    question, answer = pair
    if not answer:
        yield SourceMessage(ROLES[question], text_of(message[question], place.key(question)), place)
        return
    at = place.key("system")
    if system := text_of(message.get("system"), at, may_be_empty=True):
        yield SourceMessage("system", system, at)
    yield SourceMessage("user", text_of(message[question], place.key(question)), place.key(question))
    loss = _loss(message, place)
    yield SourceMessage("assistant", text_of(message[answer], place.key(answer)), place.key(answer), loss=loss)
