"""Every shape of record that people have becomes the same turns, and what cannot become turns says the way out.

The records follow the layouts documented by GLM-4's finetune_demo, ChatGLM3, LLaMA-Factory, ms-swift, axolotl, XTuner,
TRL and OpenAI; their wording is our own.

Run: pytest tests/data/test_shapes.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from glm4ft.data.conversation import Conversation
from glm4ft.data.read_options import ReadOptions, columns_of
from glm4ft.data.reader import parse_conversation
from glm4ft.errors import ConfigError, DataError

U1, A1, U2, A2 = ("user", "One?"), ("assistant", "Un."), ("user", "Two?"), ("assistant", "Deux.")
SYSTEM, CALL, RESULT = ("system", "Be brief."), ("assistant", '{"stop": "Mill"}'), ("observation", "3")
TOOLS = [{"type": "function", "function": {"name": "find_tram", "parameters": {"type": "object"}}}]
CALL_TEXT = json.dumps({"name": "find_tram", "arguments": {"stop": "Mill"}})
SHAREGPT = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Un."}]
MESSAGES = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Un."}]


def read(record: Any, **options: Any) -> Conversation:
    return parse_conversation(record, line=3, path="x.jsonl", options=ReadOptions(**options))


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


@dataclass(frozen=True)
class Shape:
    id: str
    record: Any
    turns: list[tuple[str, str]]


SHAPES = [
    Shape("alpaca", {"instruction": "One?", "input": "", "output": "Un."}, [U1, A1]),
    Shape("alpaca-input", {"instruction": "One", "input": "?", "output": "Un."}, [("user", "One\n?"), A1]),
    Shape("alpaca-whole",
          {"instruction": "Two?", "output": "Deux.", "system": "Be brief.", "history": [["One?", "Un."]]},
          [SYSTEM, U1, A1, U2, A2]),
    Shape("alpaca-input-alone", {"instruction": "", "input": "One?", "output": "Un."}, [U1, A1]),
    Shape("swift-query", {"query": "One?", "response": "Un."}, [U1, A1]),
    Shape("swift-history", {"system": "Be brief.", "query": "Two?", "response": "Deux.", "history": [["One?", "Un."]]},
          [SYSTEM, U1, A1, U2, A2]),
    Shape("history-of-messages", {"query": "Two?", "response": "Deux.", "history": MESSAGES}, [U1, A1, U2, A2]),
    Shape("history-in-text", {"query": "Two?", "response": "Deux.", "history": '[["One?", "Un."]]'}, [U1, A1, U2, A2]),
    Shape("swift-conversation", {"system": "Be brief.", "conversation": [{"human": "One?", "assistant": "Un."},
                                                                        {"human": "Two?", "assistant": "Deux."}]},
          [SYSTEM, U1, A1, U2, A2]),
    Shape("xtuner", {"conversation": [{"system": "Be brief.", "input": "One?", "output": "Un."}]}, [SYSTEM, U1, A1]),
    Shape("chatglm2-response", {"prompt": "Two?", "response": "Deux.", "history": [["One?", "Un."]]}, [U1, A1, U2, A2]),
    Shape("input-output", {"input": "One?", "output": "Un."}, [U1, A1]),
    Shape("sharegpt", {"conversations": SHAREGPT}, [U1, A1]),
    Shape("sharegpt-under-messages", {"messages": SHAREGPT}, [U1, A1]),
    Shape("sharegpt-bing", {"conversations": [{"from": "user", "text": "One?"}, {"from": "bing", "text": "Un."}]},
          [U1, A1]),
    Shape("sharegpt-tools", {"tools": json.dumps(TOOLS), "conversations": [
        {"from": "human", "value": "One?"}, {"from": "function_call", "value": CALL_TEXT},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "Un."}]}, [U1, CALL, RESULT, A1]),
    Shape("swift-tools", {"tools": TOOLS, "messages": [
        {"role": "user", "content": "One?"}, {"role": "tool_call", "content": CALL_TEXT},
        {"role": "tool_response", "content": "3"}, {"role": "assistant", "content": "Un."}]}, [U1, CALL, RESULT, A1]),
    Shape("chatglm3-tool", {"tools": TOOLS, "conversations": [
        {"role": "user", "content": "One?"},
        {"role": "tool", "name": "find_tram", "parameters": {"stop": "Mill"}, "observation": "3"},
        {"role": "assistant", "content": "Un."}]}, [U1, CALL, RESULT, A1]),
    Shape("responses", {"instructions": "Be brief.", "tools": TOOLS, "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "One?"}]},
        {"type": "function_call", "call_id": "c1", "name": "find_tram", "arguments": '{"stop": "Mill"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "3"}],
        "output": [{"type": "message", "role": "assistant", "status": "completed",
                    "content": [{"type": "output_text", "text": "Un.", "annotations": []}]}]},
          [SYSTEM, U1, CALL, RESULT, A1]),
    Shape("responses-text", {"input": "One?", "output": [{"type": "message", "role": "assistant", "content": "Un."}]},
          [U1, A1]),
    Shape("list-of-messages", MESSAGES, [U1, A1]),
    Shape("messages-in-text", {"messages": json.dumps(MESSAGES)}, [U1, A1]),
    Shape("calls-in-text", {"tools": TOOLS, "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "tool_calls": json.dumps([{"function": json.loads(CALL_TEXT)}])}]}, [U1, CALL]),
    Shape("pairs-of-role-and-text", {"messages": [["human", "One?"], ["assistant", "Un."]]}, [U1, A1]),
    Shape("role-as-key", {"messages": [{"user": "One?"}, {"assistant": "Un."}]}, [U1, A1]),
    Shape("developer", {"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]}, [SYSTEM, U1, A1]),
    Shape("system-prompt", {"system_prompt": "Be brief.", "messages": MESSAGES}, [SYSTEM, U1, A1]),
    Shape("system-beside-prompt", {"system": "Be brief.", "prompt": "One?", "completion": "Un."}, [SYSTEM, U1, A1]),
    Shape("finetune-demo", {"messages": [{"role": "system", "content": "", "tools": TOOLS},
                                         {"role": "user", "content": "One?"},
                                         {"role": "assistant", "metadata": "find_tram", "content": '{"stop": "Mill"}'},
                                         {"role": "observation", "content": "3"},
                                         {"role": "assistant", "content": "Un."}]}, [U1, CALL, RESULT, A1]),
    Shape("empty-result", {"tools": TOOLS, "messages": [
        {"role": "user", "content": "One?"}, {"role": "tool_call", "content": CALL_TEXT},
        {"role": "tool", "content": ""}, {"role": "assistant", "content": "Un."}]},
        [U1, CALL, ("observation", ""), A1]),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
def test_each_shape_becomes_its_turns(shape: Shape) -> None:
    conversation = read(shape.record)
    assert turns(conversation) == shape.turns
    assert conversation.warnings == ()
    assert conversation.unused == ()


NAMED = [
    ("prompt=content,completion=summary", {"content": "One?", "summary": "Un."}, [U1, A1]),
    ("prompt=completion,completion=prompt", {"completion": "One?", "prompt": "Un."}, [U1, A1]),
    ("messages=dialog,system=persona", {"dialog": MESSAGES, "persona": "Be brief."}, [SYSTEM, U1, A1]),
    ("instruction=q,output=a", {"q": "One?", "a": "Un.", "messages": MESSAGES}, [U1, A1]),
    ("role=speaker,content=said",
     {"messages": [{"speaker": "user", "said": "One?"}, {"speaker": "gpt", "said": "Un."}]}, [U1, A1]),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "record", "expected"), NAMED, ids=[case[0] for case in NAMED])
def test_columns_are_read_under_the_names_given(columns: str, record: Any, expected: Any) -> None:
    assert turns(read(record, columns=columns_of(columns))) == expected


def test_a_named_column_that_is_missing_is_said() -> None:
    with pytest.raises(DataError, match=r"(?s)lacks a column.*expected: summary"):
        read({"content": "One?"}, columns={"prompt": "content", "completion": "summary"})
    with pytest.raises(ConfigError, match="prompt"):
        ReadOptions(columns={"promt": "content"})
    with pytest.raises(ConfigError, match="our names"):
        columns_of("prompt")


HINTS = [
    ({"content": "One?", "summary": "Un."}, "--columns prompt=content,completion=summary"),
    ({"question": "One?", "answer": "Un.", "id": 3}, "--columns prompt=question,completion=answer"),
    ({"instruction": "One?", "context": "x", "response": "Un."}, "--columns input=context,output=response"),
    ({"question": "Q", "passage": "x", "answer": "A"}, "--columns instruction=question,input=passage,output=answer"),
    ({"en": "One?", "fr": "Un."}, "--columns prompt=en,completion=fr"),
    ({"prompt": "One?", "answer": "Un."}, "--columns prompt=prompt,completion=answer"),
    ({"turns": MESSAGES}, "--columns messages=turns"),
    ({"data": [{"prompt": "One?", "completion": "Un."}]}, "jq -c '.data[]' x.jsonl > x-lines.jsonl"),
    ({"text": "One? Un."}, "give the messages themselves"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "fix"), HINTS, ids=[hint[1] for hint in HINTS])
def test_a_record_of_no_shape_is_refused_with_what_would_read_it(record: Any, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        read(record)
    assert fix in caught.value.fix


REFUSED = [
    ("chosen", {"prompt": "One?", "chosen": "Un.", "rejected": "Deux."}, "preference"),
    ("rejected_messages", {"messages": MESSAGES, "rejected_messages": MESSAGES}, "preference"),
    ("kto_tag", {"instruction": "One?", "output": "Un.", "kto_tag": False}, "preference"),
    ("label", {"prompt": "One?", "completion": "Un.", "label": True}, "preference"),
    ("videos", {"query": "One?", "response": "Un.", "videos": ["a.mp4"]}, "media"),
    ("image_url", {"messages": [MESSAGES[0] | {"image_url": "a"}, MESSAGES[1]]}, "media"),
    ("content[0]", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "media"),
    ("thoughts", {"messages": [MESSAGES[0], MESSAGES[1] | {"thoughts": "r"}]}, "reasoning"),
    ("input[0]", {"input": [{"type": "reasoning", "summary": []}], "output": "Un."}, "reasoning"),
    ("content[0]", {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "r"}]}]},
     "reasoning"),
    ("loss_mask", {"messages": [MESSAGES[0], MESSAGES[1] | {"loss_mask": 1}]}, "mask"),
    ("train_detail", {"messages": [MESSAGES[0], MESSAGES[1] | {"train_detail": [{"begin_offset": 0}]}]}, "in parts"),
    ("loss_scale", {"messages": [MESSAGES[0], MESSAGES[1] | {"loss_scale": 2.0}]}, "factor"),
    ("train", {"messages": MESSAGES, "train": False}, "training flag"),
    ("weight", {"messages": MESSAGES, "weight": 0.5}, "training flag"),
    ("trainable", {"prompt": "One?", "completion": "Un.", "trainable": "False"}, "training flag"),
    ("refusal", {"messages": [MESSAGES[0], MESSAGES[1] | {"refusal": "No."}]}, "refusal"),
    ("documents", {"messages": MESSAGES, "documents": [{"title": "x"}]}, "documents"),
    ("instructions", {"system": "a", "instructions": "b", "messages": MESSAGES}, "two system prompts"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "record", "words"), REFUSED, ids=[f"{case[0]}-{case[2]}" for case in REFUSED])
def test_a_key_with_a_meaning_that_would_be_lost_is_refused(key: str, record: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(record)
    assert caught.value.where.endswith(key)
    assert words in caught.value.message
    assert caught.value.fix


def test_keys_without_a_meaning_are_listed_once() -> None:
    record = {"messages": [MESSAGES[0] | {"name": "Li", "id": 1}, MESSAGES[1] | {"x": None}], "source": "web", "n": []}
    assert read(record).unused == ("source", "messages[*].name")
    pairs = {"conversation": [{"human": "One?", "assistant": "Un.", "score": 3}], "chat_template_kwargs": {"x": 1}}
    assert read(pairs).unused == ("chat_template_kwargs", "conversation[*].score")
    odd = {"messages": [MESSAGES[0] | {"arguments": "x"}, MESSAGES[1] | {"output": "y", "status": "done"}]}
    assert read(odd).unused == ("messages[*].arguments", "messages[*].output")


@pytest.mark.parametrize(("role", "hint"), [("assistent", "assistant"), ("tool_cal", "tool_call"), ("tools", "")])
def test_a_hint_never_names_another_role(role: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        read({"messages": [*MESSAGES, {"role": role, "content": "x"}]})
    assert (f"did you mean {hint!r}?" in caught.value.fix) if hint else ("did you mean" not in caught.value.fix)
