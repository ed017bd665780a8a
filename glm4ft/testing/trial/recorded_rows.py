"""The rows of a recorded run: what it trained, read back from its gradients, and what it should have trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import Conversation
from glm4ft.data.encoded_row import IGNORED
from glm4ft.data.format_check import detect_format
from glm4ft.data.inputs import data_inputs
from glm4ft.data.reader import read_conversations
from glm4ft.data.turn_format import FORMATS
from glm4ft.errors import ModelError
from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.replay.departure import Departure
from glm4ft.testing.specification.chat_template import WHY, Marks, Mistake, answers, expected_row, find_mistakes
from glm4ft.testing.specification.mask_oracle import Undecidable, show_tokens
from glm4ft.testing.specification.recovered_targets import recover_targets, split_rows
from glm4ft.testing.specification.reference import LabelledIds, Reference


@dataclass(frozen=True)
class TrainedRow:
    """A row that went through the model, and the labels that it was trained with.

    Args:
        ids: The token ids.
        labels: The labels; -100 where no gradient arrived.
        step: The first optimizer step that trained it, from 1.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    step: int


def trained_rows(trace: Trace, reference: Reference) -> list[TrainedRow]:
    """The different rows of the recorded steps, in order."""
    rows: dict[tuple[int, ...], TrainedRow] = {}
    for number, step in enumerate(trace.steps, start=1):
        if trace.sampled and step.whole is None:
            break
        weight_VD = reference.head_weight(step.weights)
        for forward in step.forwards:
            if forward.gradient_BTD is None or not forward.gradient_BTD.isfinite().all():
                continue
            pairs = zip(forward.hidden_BTD, forward.gradient_BTD, strict=True)
            targets = [recover_targets(hidden_TD, gradient_TD, weight_VD) for hidden_TD, gradient_TD in pairs]
            for b, positions in split_rows(forward):
                ids = forward.input_ids_BT[b][positions].tolist()
                trained = (targets[b].labels_T[positions] != IGNORED).tolist()
                labels = [id if is_trained else IGNORED for id, is_trained in zip(ids, trained, strict=True)]
                rows.setdefault(tuple(ids), TrainedRow(tuple(ids), (IGNORED, *labels[1:]), number))
    return list(rows.values())


def expected_rows(
    data: str, reference: Reference, marks: Marks | None, seen: Sequence[TrainedRow]
) -> list[LabelledIds]:
    """The rows that conversations should be encoded as: by the GLM format of the base, or else by its chat template.

    Args:
        data: The conversations, as ``glm4ft train --data`` names them.
        reference: The specification on the run's base.
        marks: The tokens around an answer in the base's template; None if they are unknown.
        seen: The rows that the run trained: of several ways to end a conversation, the one that it used is taken.
    Raises:
        Undecidable: If the base has neither.
        DataError: If a conversation cannot be read.
    """
    conversations = [talk for one in data_inputs(data) for talk in read_conversations(one.name)]
    names = {row.ids for row in seen}
    by_way = [_distinct(rows) for rows in _ways(conversations, reference, marks)]
    return max(by_way, key=lambda rows: sum(ids in names for ids, _ in rows))


def _ways(
    conversations: Sequence[Conversation], reference: Reference, marks: Marks | None
) -> Iterator[list[LabelledIds]]:
    """The rows in each way to write them that is right."""
    tokenizer = reference.tokenizer
    if (name := glm_format(reference)) is not None:
        for final_stop in ("role", "endoftext"):
            encoder = ChatFormat(name, tokenizer, final_stop=final_stop, allow_nonstop_terminator=True)
            encoded = [encoder.encode(conversation) for conversation in conversations]
            yield [(tuple(row.input_ids), tuple(row.labels)) for row in encoded]
        return
    if marks is None:
        raise Undecidable("the base has no chat template that marks its answers")
    rows = [expected_row(tokenizer, *_messages(conversation), marks) for conversation in conversations]
    yield rows
    for terminator in sorted(marks.terminators):  # many trainers end a row with the tokenizer's end of text
        yield [((*ids, terminator), (*labels, terminator)) for ids, labels in rows]
    yield [_without_end(row, tokenizer) for row in rows]  # or take the line end behind the terminator away


def _without_end(row: LabelledIds, tokenizer: Any) -> LabelledIds:
    ids, labels = row
    is_blank = labels[-1] == IGNORED and not tokenizer.decode([ids[-1]]).strip()
    return (ids[:-1], labels[:-1]) if is_blank else row


def _messages(conversation: Conversation) -> tuple[list[dict[str, Any]], Any]:
    """The messages as a template takes them."""
    found = [{"role": m.role, "content": m.content, "loss": m.loss,
              **({"metadata": m.metadata} if m.metadata else {})} for m in conversation.messages]  # fmt: skip
    return found, list(conversation.tools) or None


def _distinct(rows: Sequence[LabelledIds]) -> list[LabelledIds]:
    return list(dict(rows).items())


def glm_format(reference: Reference) -> Any:
    """The name of the GLM format of the base; None if it has another template."""
    config = json.loads((Path(reference.base_dir) / "config.json").read_text("utf-8"))
    try:
        found = detect_format(config.get("architectures") or [], reference.tokenizer)
    except ModelError:
        return None
    return found if found in FORMATS else None


def stop_ids(base_dir: Path) -> list[int]:
    """The tokens that end generation, by the generation config of a base, or else by its configuration."""
    for name in ("generation_config.json", "config.json"):
        path = base_dir / name
        found = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return list(found) if isinstance(found, list) else [int(found)]
    return []


def template_departures(rows: Sequence[TrainedRow], reference: Reference, marks: Marks) -> Iterator[Departure]:
    """The mistakes in the labels of rows by the rules that hold for every template: one departure of each kind."""
    tokenizer = reference.tokenizer
    found: dict[tuple[str, bool], tuple[TrainedRow, Mistake]] = {}
    counts: Counter[tuple[str, bool]] = Counter()
    for row in rows:
        if not answers(row.ids, marks):
            continue  # no conversation
        for mistake in find_mistakes(tokenizer, row.ids, row.labels, marks):
            counts[mistake.kind, mistake.is_trained] += 1
            found.setdefault((mistake.kind, mistake.is_trained), (row, mistake))
    for kind, (row, mistake) in found.items():
        at = mistake.position
        where = f"position {at} {tokenizer.decode([row.ids[at]])!r}" if at < len(row.ids) else "the end of the row"
        is_now = "is trained" if mistake.is_trained else "is not trained"
        if mistake.kind == "prefix":
            is_now = "comes again"
        if at == len(row.ids):
            where, is_now = f"the row ends at position {at}", "without a terminator"
        text = f"{where} {is_now}: {WHY[mistake.kind]} ({counts[kind]} like it); {show_tokens(tokenizer, row.ids, at)}"
        yield Departure("rows", row.step, text, hides=("loss", "gradient"))


def has_answers(rows: Sequence[TrainedRow], marks: Marks) -> bool:
    """Whether any row has an answer by the template; text without one is no conversation."""
    return any(answers(row.ids, marks) for row in rows)


def untrained_answers(rows: Sequence[TrainedRow], marks: Marks) -> Mapping[str, int]:
    """How many answers the rows have, and how many of them are not trained at all."""
    found = [(row, answer) for row in rows for answer in answers(row.ids, marks)]
    silent = [1 for row, answer in found if all(row.labels[i] == IGNORED for i in answer if i < len(row.ids))]
    return {"answers": len(found), "untrained": len(silent)}
