"""Encoding conversations with their mask against what yields ids alone: ``apply_chat_template``, and bare texts.

Run: pytest tests/bench/bench_encoding.py -o python_files=bench_*.py [--glm4ft-tokenizer PATH]
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import pytest
from transformers import AutoTokenizer

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation
from glm4ft.data.reader import from_messages
from glm4ft.model.tiny_tokenizer import tiny_tokenizer

TEXT = "The Seine runs through Paris, 塞纳河穿过巴黎。 It is 777 kilometres long and rises near Dijon.\n"


def conversations(num: int) -> list[Conversation]:
    def message(i: int, turn: int) -> dict[str, str]:
        text = f"{i} {turn}: " + TEXT * (1 + (i + turn) % 5)
        return {"role": "assistant" if turn % 2 else "user", "content": text}

    return [from_messages([message(i, turn) for turn in range(6)]) for i in range(num)]


@pytest.mark.benchmark(group="encoding")
def test_encoding_against_the_chat_template(benchmark: Any, request: pytest.FixtureRequest) -> None:
    path = request.config.getoption("--glm4ft-tokenizer") or os.environ.get("GLM4FT_TOKENIZER")
    tokenizer = AutoTokenizer.from_pretrained(path) if path else tiny_tokenizer()
    chat_format = ChatFormat("glm-4-9b-chat" if path else "glm-4-0414", tokenizer)
    data = conversations(300)
    plain = [[{"role": m.role, "content": m.content, "metadata": ""} for m in c.messages] for c in data]
    texts = ["\n".join(m.content for m in c.messages) for c in data]
    ratios, raw_ratios = [], []

    def round_() -> None:
        raw_s = time.perf_counter()
        for text in texts:
            tokenizer.backend_tokenizer.encode(text)
        began_s = time.perf_counter()
        for messages in plain:
            tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        between_s = time.perf_counter()
        for conversation in data:
            chat_format.encode(conversation)
        ours_s = time.perf_counter() - between_s
        ratios.append((between_s - began_s) / ours_s)
        raw_ratios.append((began_s - raw_s) / ours_s)

    benchmark.pedantic(round_, rounds=7, warmup_rounds=1)
    benchmark.extra_info["apply_chat_template / glm4ft"] = [round(ratio, 2) for ratio in sorted(ratios)]
    benchmark.extra_info["raw tokenizer / glm4ft"] = [round(ratio, 2) for ratio in sorted(raw_ratios)]
    print(f"\nraw tokenizer / glm4ft, time: median {statistics.median(raw_ratios):.2f}, {sorted(raw_ratios)}")
    print(f"apply_chat_template / glm4ft, time: median {statistics.median(ratios):.2f}, {sorted(ratios)}")
