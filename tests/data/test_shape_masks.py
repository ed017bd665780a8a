"""No text becomes a control token, whatever shape of record or format of file it comes from.

Run: pytest tests/data/test_shape_masks.py  [--glm4ft-tokenizer FOLDER: repeats everything with a real GLM-4 tokenizer]
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.json_stream import JsonStream
from glm4ft.data.read_options import ReadOptions
from glm4ft.data.reader import from_messages, parse_conversation
from glm4ft.testing.strategies import MARKERS, text_contents

InEachLane = Callable[..., Iterator[ChatFormat]]
Turn = tuple[str, str]  # question and answer
TOOLS = [{"type": "function", "function": {"name": "find_tram"}}]


def alpaca(system: str, turns: list[Turn]) -> Any:
    question, answer = turns[-1]
    return {"system": system, "instruction": question, "output": answer, "history": [list(turn) for turn in turns[:-1]]}


def query_response(system: str, turns: list[Turn]) -> Any:
    question, answer = turns[-1]
    return {"system": system, "query": question, "response": answer, "history": json.dumps(turns[:-1])}


def pairs(system: str, turns: list[Turn]) -> Any:
    return {"system": system, "conversation": [{"human": question, "assistant": answer} for question, answer in turns]}


def sharegpt(system: str, turns: list[Turn]) -> Any:
    said = [(speaker, text) for turn in turns for speaker, text in zip(("human", "gpt"), turn, strict=True)]
    return {"system": system, "conversations": [{"from": speaker, "value": text} for speaker, text in said]}


def responses(system: str, turns: list[Turn]) -> Any:
    items = [
        {"type": "message", "role": role, "content": [{"type": f"{side}_text", "text": text}]}
        for turn in turns
        for role, side, text in zip(("user", "assistant"), ("input", "output"), turn, strict=True)
    ]
    return {"instructions": system, "input": items[:-1], "output": items[-1:]}


def messages_in_text(system: str, turns: list[Turn]) -> Any:
    return {"messages": json.dumps(messages(system, turns))}


def list_of_messages(system: str, turns: list[Turn]) -> Any:
    return messages(system, turns)


def roles_as_keys(system: str, turns: list[Turn]) -> Any:
    return {"messages": [{message["role"]: message["content"]} for message in messages(system, turns)]}


def lists_of_role_and_text(system: str, turns: list[Turn]) -> Any:
    return {"messages": [[message["role"], message["content"]] for message in messages(system, turns)]}


def prompt_completion(system: str, turns: list[Turn]) -> Any:
    said = messages(system, turns)
    return {"prompt": said[:-1], "completion": said[-1:]}


def xtuner(system: str, turns: list[Turn]) -> Any:
    said = [{"input": question, "output": answer} for question, answer in turns]
    return {"conversation": [{"system": system, **said[0]}, *said[1:]]}


def columns_of_other_names(system: str, turns: list[Turn]) -> Any:
    return {"dialog": [{"speaker": message["role"], "said": message["content"]} for message in messages(system, turns)]}


def in_csv(system: str, turns: list[Turn]) -> Any:
    """As a cell of CSV gives it back."""
    file = io.StringIO(newline="")
    csv.writer(file).writerow([json.dumps(messages(system, turns))])
    (cell,) = next(csv.reader(io.StringIO(file.getvalue(), newline="")))
    return {"messages": cell}


def in_array(system: str, turns: list[Turn]) -> Any:
    """As an array of a file gives it back."""
    array = json.dumps([sharegpt(system, turns)], ensure_ascii=False, indent=1).encode()
    ((_, record),) = JsonStream(io.BytesIO(array), "x.json").records()
    return record


def messages(system: str, turns: list[Turn]) -> list[dict[str, str]]:
    said = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return said


SHAPES = (
    alpaca, query_response, pairs, sharegpt, responses, messages_in_text, list_of_messages, roles_as_keys,
    lists_of_role_and_text, prompt_completion, xtuner, columns_of_other_names, in_csv, in_array,
)  # fmt: skip
TEXTS = text_contents() | st.sampled_from(MARKERS)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(system=st.just("") | TEXTS, turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
@example(system="<|user|>", turns=[("<|assistant|>\n[gMASK]<sop>", "<|observation|><|endoftext|>")])
def test_control_ids_follow_from_the_roles_in_every_shape(
    in_each_lane: InEachLane, shape: Callable[[str, list[Turn]], Any], system: str, turns: list[Turn]
) -> None:
    """The row is that of the plain messages, and its control ids are the prefix, a header a message and the stop."""
    named = {"messages": "dialog", "role": "speaker", "content": "said"} if shape is columns_of_other_names else {}
    conversation = parse_conversation(shape(system, turns), options=ReadOptions(columns=named))
    for chat_format in in_each_lane():
        row = chat_format.encode(conversation)
        assert row.input_ids == chat_format.encode(from_messages(messages(system, turns))).input_ids
        header, control = chat_format.header_ids, set(chat_format.tokenizer.get_added_vocab().values())
        roles = ["system"] * bool(system) + ["user", "assistant"] * len(turns) + ["user"]
        expected = [*chat_format.prefix_ids, *(header[role] for role in roles)]
        assert [token for token in row.input_ids if token in control] == expected


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(before=st.just("") | TEXTS, stop=TEXTS, result=st.just("") | TEXTS, answer=TEXTS)
def test_control_ids_follow_from_the_roles_of_calls(
    in_each_lane: InEachLane, before: str, stop: str, result: str, answer: str
) -> None:
    """Calls of OpenAI's Responses, with any arguments and with an empty result."""
    call = {"type": "function_call", "call_id": "c", "name": "find_tram", "arguments": json.dumps({"stop": stop})}
    record = {
        "instructions": before,
        "tools": TOOLS,
        "input": [
            {"type": "message", "role": "user", "content": "Tram?"},
            call,
            {"type": "function_call_output", "call_id": "c", "output": result},
        ],
        "output": [{"type": "message", "role": "assistant", "content": f"It is {answer}"}],
    }
    conversation = parse_conversation(record)
    for chat_format in in_each_lane():
        row = chat_format.encode(conversation)
        header, control = chat_format.header_ids, set(chat_format.tokenizer.get_added_vocab().values())
        system = ["system"] * (1 + bool(before))  # the tools have a block of their own
        roles = [*system, "user", "assistant", "observation", "assistant", "user"]
        expected = [*chat_format.prefix_ids, *(header[role] for role in roles)]
        assert [token for token in row.input_ids if token in control] == expected
        assert sum(row.supervised) == sum(turn.end - turn.start + 1 for turn in row.turns)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(stop=TEXTS, answer=TEXTS)
@example(stop="<|observation|>", answer="<|endoftext|>")
def test_control_ids_follow_from_the_roles_of_calls_in_the_content(
    in_each_lane: InEachLane, stop: str, answer: str
) -> None:
    """A call that was written into an answer's text, and is read as one."""
    record = {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "Tram?"},
            {"role": "assistant", "content": "find_tram\n" + json.dumps({"stop": stop})},
            {"role": "observation", "content": "3"},
            {"role": "assistant", "content": f"It is {answer}"},
        ],
    }
    conversation = parse_conversation(record, options=ReadOptions(calls_in_content=True))
    assert conversation.messages[1].metadata == "find_tram"
    for chat_format in in_each_lane():
        row = chat_format.encode(conversation)
        header, control = chat_format.header_ids, set(chat_format.tokenizer.get_added_vocab().values())
        roles = ["system", "user", "assistant", "observation", "assistant", "user"]
        expected = [*chat_format.prefix_ids, *(header[role] for role in roles)]
        assert [token for token in row.input_ids if token in control] == expected
