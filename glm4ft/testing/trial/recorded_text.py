"""Words the verdict on a recorded run, as lines of text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.replay.replay import JUDGES
from glm4ft.testing.trial.recorded import JudgedRecording
from glm4ft.testing.trial.wording import LOOK_AT
from glm4ft.text.safe_text import visible

SHOWN_ROWS = 2
STAGES = ("batches", "model", "gradient", "clipping", "schedule", "update")  # rows are shown, not judged


def lines(judged: JudgedRecording) -> Iterator[str]:
    """The verdict as lines of text: what was recorded, what was trained, and each stage."""
    processes = f"{judged.num_processes} process{'es' * (judged.num_processes != 1)}"
    yield f"{judged.num_steps} optimizer steps of {processes}, {len(judged.rows)} different rows"
    yield "trained tokens in brackets:"
    for text in shown_rows(judged):
        yield f"  {text}"
    for stage in ("rows", *STAGES):
        for departure in judged.verdict.at(stage):
            yield f"{stage:9} DEPARTS  {departure}"
        if judged.verdict.at(stage):
            yield f"{'':9} look at  {LOOK_AT[stage]}"
        elif stage != "rows":
            yield f"{stage:9} {_state(judged, stage)}"


def _state(judged: JudgedRecording, stage: str) -> str:
    if why := judged.not_judged.get(stage, ""):
        loss = "the weights of tokens in the loss agree; the rest is " if _judges_loss_alone(judged, stage) else ""
        return f"{loss}not judged: {why}"
    if by := judged.verdict.hidden.get(stage):
        return f"not judged: a departure at {by} hides it"
    size = judged.verdict.largest.get(stage)
    return "agrees" + (f"   largest relative difference {size:.1e}" if size is not None else "")


def _judges_loss_alone(judged: JudgedRecording, stage: str) -> bool:
    return stage == "gradient" and "loss" not in judged.not_judged


def shown_rows(judged: JudgedRecording) -> Iterator[str]:
    """The first rows as text, with each run of trained tokens in brackets."""
    assert judged.reference is not None
    for ids, labels in judged.rows[:SHOWN_ROWS]:
        parts = []
        for is_trained, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
            text = visible(judged.reference.tokenizer.decode([id for id, _ in run]), newlines=False)
            parts.append(f"[{text}]" if is_trained else text)
        yield "".join(parts)


def record(judged: JudgedRecording) -> dict[str, Any]:
    """The verdict in the form that ``glm4ft judge --json`` writes."""
    first = judged.verdict.departure
    departures = [
        {"stage": d.stage, "step": d.step, "found": d.text, "cause": d.cause, "size": d.size}
        for stage in dict.fromkeys(("gradient" if name == "loss" else name) for name in JUDGES)
        for d in judged.verdict.at(stage)
    ]
    return {
        "schema": 1,
        "steps": judged.num_steps,
        "processes": judged.num_processes,
        "rows": len(judged.rows),
        "first_departure": None if first is None else first.stage,
        "departures": departures,
        "not_judged": {**judged.verdict.hidden, **judged.not_judged},
    }
