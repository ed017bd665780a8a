"""Sample contents of reports for the tests in this folder, made without training."""

from __future__ import annotations

import math
from dataclasses import replace

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.data.inputs import DEMO_DATA
from glm4ft.data.reader import read_conversations
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.report.content import Content, Curves, Headline, ShownCheck, ShownOption, ShownRow, ShownTurn
from glm4ft.report.costly_tokens import part_counts, token_parts
from glm4ft.report.run_report import shown_row
from glm4ft.testing.subjects.founding_bug import FoundingBugFormat

TOKENIZER = tiny_tokenizer()
FORMAT = ChatFormat("glm-4-0414", TOKENIZER)
# Markup, terminal controls, bidi controls, runner commands, Markdown, and our own cues.
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> \"' &amp; </style></title> {{ 7*7 }} \x1b[31mred\x07 "
    "\u202egnp.exe ::error::x ##[group]y `code` ``` [a](javascript:alert(1)) http://a.example www.a.example *b* "
    "<|assistant|> ✗ ⟨… | a\\|b |"
)
HOSTILE_LINES = f"::add-mask::x\n{HOSTILE}\n  ::error::y\n# heading\n- item\n"


def row_of(*texts: str, chat_format: ChatFormat = FORMAT) -> EncodedRow:
    """Encode a conversation of alternating user and assistant messages."""
    messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return chat_format.encode(Conversation(tuple(messages), line=7))


def with_losses(row: EncodedRow, *, header: float = 0.0, terminator: float = 0.002, body: float = 0.002) -> ShownRow:
    """Make the shown form of a row, each target with the loss of its part."""
    by_part = {"assistant header": header, "terminator": terminator}
    parts = token_parts(row.input_ids, TOKENIZER)
    losses = [by_part.get(p, body) if keep else None for p, keep in zip(parts, row.supervised, strict=True)]
    shown = shown_row(row)
    return replace(
        shown,
        losses=losses,
        said=[10 if p == "assistant header" else i for p, i in zip(parts, row.input_ids, strict=True)],
    )


def founding_bug() -> Content:
    """Make the report of a finished run on the bundled conversations that trained headers and not terminators."""
    encoder = FoundingBugFormat("glm-4-0414", TOKENIZER)
    rows = tuple(with_losses(encoder.encode(c), header=5.5) for c in read_conversations(DEMO_DATA))
    steps = [
        {"step": s, "loss": 0.19 + 8.6 * math.exp(-s / 6), "grad_norm": 2.5 * math.exp(-s / 15), "lr": 5e-3}
        for s in range(1, 61)
    ]
    answer = "\nThe Seine runs through Paris. 塞纳河穿过巴黎。"
    return Content(
        title="glm4ft training run · bug",
        headline=Headline(
            "bad",
            "<|assistant|> is a target, and the frozen head cannot express it.",
            "all 4 <|assistant|> headers, 0 of 4 ends of assistant turns.",
            ("4 headers hold 98% of the loss.", "The loss stopped at 0.19."),
            ("Start the supervised span after the header.",),
        ),
        tokenizer=TOKENIZER,
        curves=Curves.of(steps, target=0.01, floor=0.18, clip=1.0),
        counts=part_counts(rows, TOKENIZER),
        rows=rows,
        num_rows=2,
        turns=(
            ShownTurn("line 1, messages[3]", f"{answer}<|user|>", f"{answer} cit fu", exact=False),
            ShownTurn(
                "line 2, messages[2]", "f\n{}<|observation|>", "f\n{}<|observation|>", True, stop="<|observation|>"
            ),
        ),
        facts=(
            ("adapter", "12 adapters on 6 targets, 30,720 trained of 469,120 parameters (6.55 %)"),
            ("device", "cpu"),
        ),
        options=(ShownOption("schedule", "constant", "command line"), ShownOption("seed", "0", "default")),
        command="glm4ft train --config bug/config.yaml --output NEW_FOLDER",
    )


def hostile() -> Content:
    """Make a report with hostile text in every field that can hold external text."""
    row = with_losses(row_of(HOSTILE_LINES, HOSTILE_LINES), body=1.0, terminator=3.0)
    return Content(
        title=HOSTILE,
        headline=Headline("unsure", HOSTILE_LINES, HOSTILE_LINES, (HOSTILE_LINES, HOSTILE), (HOSTILE_LINES, HOSTILE)),
        tokenizer=TOKENIZER,
        curves=Curves.of([{"loss": 1.0}, {"loss": math.nan}]),
        runs=((HOSTILE_LINES, Curves.of([{"loss": 1.0}])),),
        counts={HOSTILE_LINES: (3, 2, 1)},
        rows=(replace(row, title=HOSTILE_LINES),),
        num_rows=5,
        turns=(ShownTurn(HOSTILE_LINES, HOSTILE_LINES, HOSTILE_LINES[:30] + HOSTILE, False, stop=HOSTILE),),
        checks=(
            ShownCheck("rows", HOSTILE_LINES, "failed", HOSTILE_LINES, HOSTILE_LINES),
            ShownCheck("rows", HOSTILE_LINES, "passed"),
        ),
        facts=((HOSTILE_LINES, HOSTILE_LINES), ("adapter", HOSTILE_LINES)),
        options=(ShownOption(HOSTILE_LINES, HOSTILE_LINES, HOSTILE_LINES),),
        command=HOSTILE_LINES,
    )
