"""Every format that GLM-4's finetune_demo, LLaMA-Factory, ms-swift, axolotl and TRL document is read, or refused.

The layouts are those of their documentation; the wording is our own. What is refused is refused with the way out.

Run: pytest tests/data/test_documented_formats.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from glm4ft.data.read_options import ReadOptions, columns_of
from glm4ft.data.reader import parse_conversation
from glm4ft.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Un."}
HUMAN, GPT = {"from": "human", "value": "One?"}, {"from": "gpt", "value": "Un."}
TOOLS = [{"type": "function", "function": {"name": "find_tram", "parameters": {"type": "object"}}}]
CALL = json.dumps({"name": "find_tram", "arguments": {"stop": "Mill"}})
Q, A, S = ("user", "One?", True), ("assistant", "Un.", True), ("system", "Be brief.", True)
UNTRAINED = ("assistant", "Un.", False)
CALLED, RESULT = ("assistant", '{"stop": "Mill"}', True), ("observation", "3", True)


@dataclass(frozen=True)
class Documented:
    """One documented format.

    Args:
        id: The trainer and its name of the format.
        record: A record of it.
        turns: What it is read as; empty if it is refused.
        problem: What the refusal says.
        fix: What the refusal says to do.
        columns: The option that it needs.
    """

    id: str
    record: Any
    turns: tuple[tuple[str, str, bool], ...] = ()
    problem: str = ""
    fix: str = ""
    columns: str = ""


def preference(id: str, record: Any) -> Documented:
    return Documented(id, record, problem="preference data", fix="a preference trainer")


def media(id: str, record: Any) -> Documented:
    return Documented(id, record, problem="media", fix="remove the key if the text stands alone")


FORMATS = [
    # GLM-4, finetune_demo/README
    Documented("finetune_demo messages", {"messages": [USER, ASSISTANT]}, (Q, A)),
    Documented("finetune_demo system", {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]},
               (S, Q, A)),
    Documented("finetune_demo tools", {"messages": [
        {"role": "system", "content": "", "tools": TOOLS}, USER,
        {"role": "assistant", "metadata": "find_tram", "content": '{"stop": "Mill"}'},
        {"role": "observation", "content": "3"}, ASSISTANT]}, (Q, CALLED, RESULT, A)),
    Documented("finetune_demo AdvertiseGen", {"content": "One?", "summary": "Un."},
               problem="no known shape", fix="--columns prompt=content,completion=summary"),
    Documented("finetune_demo AdvertiseGen, named", {"content": "One?", "summary": "Un."}, (Q, A),
               columns="prompt=content,completion=summary"),
    media("finetune_demo glm-4v", {"messages": [USER | {"image": "a.jpg"}, ASSISTANT]}),
    # LLaMA-Factory, data/README
    Documented("llamafactory alpaca", {"instruction": "One?", "input": "", "output": "Un.", "system": "Be brief.",
                                       "history": [["One?", "Un."]]}, (S, Q, A, Q, A)),
    Documented("llamafactory pretraining", {"text": "One. Two."}, problem="one text", fix="give the messages"),
    preference("llamafactory alpaca ranking", {"instruction": "One?", "chosen": "Un.", "rejected": "Deux."}),
    preference("llamafactory alpaca KTO", {"instruction": "One?", "output": "Un.", "kto_tag": True}),
    media("llamafactory alpaca image", {"instruction": "<image>One?", "output": "Un.", "images": ["a.jpg"]}),
    Documented("llamafactory sharegpt", {"system": "Be brief.", "tools": json.dumps(TOOLS), "conversations": [
        HUMAN, {"from": "function_call", "value": CALL}, {"from": "observation", "value": "3"}, GPT]},
        (S, Q, CALLED, RESULT, A)),
    preference("llamafactory sharegpt ranking", {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}),
    preference("llamafactory sharegpt KTO", {"conversations": [HUMAN, GPT], "kto_tag": False}),
    media("llamafactory sharegpt audio", {"conversations": [HUMAN, GPT], "audios": ["a.mp3"]}),
    media("llamafactory sharegpt video", {"conversations": [HUMAN, GPT], "videos": ["a.mp4"]}),
    Documented("llamafactory openai", {"messages": [USER, ASSISTANT]}, (Q, A)),
    Documented("llamafactory dataset_info", {"talks": {"file_name": "talks.json", "formatting": "sharegpt"}},
               problem="lists data sets", fix="name the files that it lists"),
    # ms-swift, Customization/Custom-dataset
    Documented("swift messages, loss", {"messages": [USER, ASSISTANT | {"loss": False}, USER, ASSISTANT]},
               (Q, UNTRAINED, Q, A)),
    Documented("swift sharegpt", {"system": "Be brief.", "conversation": [{"human": "One?", "assistant": "Un."}]},
               (S, Q, A)),
    Documented("swift query-response", {"system": "Be brief.", "query": "One?", "response": "Un.",
                                        "history": [["One?", "Un."]]}, (S, Q, A, Q, A)),
    Documented("swift alpaca", {"instruction": "One?", "input": "", "output": "Un."}, (Q, A)),
    Documented("swift agent", {"tools": json.dumps(TOOLS), "messages": [
        USER, {"role": "tool_call", "content": CALL}, {"role": "tool_response", "content": "3"}, ASSISTANT]},
        (Q, CALLED, RESULT, A)),
    Documented("swift channel", {"messages": [USER, ASSISTANT], "channel": "web"}, (Q, A)),
    preference("swift DPO", {"messages": [USER, ASSISTANT], "rejected_response": "Deux."}),
    preference("swift DPO of messages", {"messages": [USER, ASSISTANT], "rejected_messages": [USER, ASSISTANT]}),
    preference("swift KTO", {"messages": [USER, ASSISTANT], "label": False}),
    preference("swift embedding", {"messages": [USER], "positive_messages": [[USER]], "negative_messages": [[USER]]}),
    Documented("swift GRPO", {"messages": [USER], "solution": "1"}, problem="no assistant turn",
               fix="add the answer to learn"),
    Documented("swift classification", {"messages": [USER], "label": 1}, problem="no assistant turn",
               fix="add the answer to learn"),
    media("swift grounding", {"messages": [USER, ASSISTANT], "images": ["a.jpg"], "objects": {"bbox": [[1, 2, 3, 4]]}}),
    # axolotl, dataset-formats
    Documented("axolotl chat_template", {"messages": [USER, ASSISTANT | {"train": False}, USER, ASSISTANT]},
               (Q, UNTRAINED, Q, A)),
    Documented("axolotl chat_template, other names", {"chat": [{"speaker": "user", "said": "One?"},
                                                               {"speaker": "assistant", "said": "Un."}]}, (Q, A),
               columns="messages=chat,role=speaker,content=said"),
    Documented("axolotl training_detail", {"messages": [USER, ASSISTANT | {
        "training_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}]}, problem="trained in parts",
        fix="give the message a loss"),
    Documented("axolotl alpaca", {"instruction": "One?", "output": "Un."}, (Q, A)),
    Documented("axolotl input_output", {"segments": [{"label": True, "text": "<s>Un."}]}, problem="segments",
               fix="give the messages"),
    Documented("axolotl completion", {"text": "Un."}, problem="one text", fix="give the messages"),
    Documented("axolotl pre-tokenized", {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2]},
               problem="token ids", fix="give the conversations that they were made from"),
    Documented("axolotl stepwise", {"prompt": "One?", "completions": ["Un.", "Deux."], "labels": [True, False]},
               problem="holds steps", fix="a record for each answer"),
    preference("axolotl KTO", {"prompt": "One?", "completion": "Un.", "label": True}),
    # TRL, dataset_formats
    Documented("trl language modeling", {"text": "Un."}, problem="one text", fix="give the messages"),
    Documented("trl conversational", {"messages": [USER, ASSISTANT], "tools": TOOLS}, (Q, A)),
    Documented("trl prompt-only", {"prompt": "One?"}, problem="a text is missing", fix="give it text"),
    Documented("trl prompt-completion", {"prompt": "One?", "completion": "Un."}, (Q, A)),
    Documented("trl conversational prompt-completion", {"prompt": [USER], "completion": [ASSISTANT],
                                                        "chat_template_kwargs": {"enable_thinking": False}}, (Q, A)),
    preference("trl preference", {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}),
    preference("trl implicit preference", {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}),
    preference("trl unpaired preference", {"prompt": [USER], "completion": [ASSISTANT], "label": True}),
    media("trl vision", {"images": ["a.jpg"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]}, ASSISTANT]}),
]  # fmt: skip


@pytest.mark.parametrize("case", FORMATS, ids=lambda case: case.id)
def test_documented_format_is_read_or_refused_with_the_way_out(case: Documented) -> None:
    options = ReadOptions(columns=columns_of(case.columns or None))
    if case.turns:
        conversation = parse_conversation(case.record, line=3, path="x.jsonl", options=options)
        assert tuple((m.role, m.content, m.loss) for m in conversation.messages) == case.turns
        return
    with pytest.raises(DataError) as caught:
        parse_conversation(case.record, line=3, path="x.jsonl", options=options)
    assert case.problem in caught.value.message
    assert case.fix in caught.value.fix
    assert caught.value.where.startswith("x.jsonl:3")


def test_a_conversation_beside_its_token_ids_is_read() -> None:
    """Some trainers keep both; the ids are a key without a use here."""
    conversation = parse_conversation({"messages": [USER, ASSISTANT], "input_ids": [1, 2]})
    assert conversation.unused == ("input_ids",)
