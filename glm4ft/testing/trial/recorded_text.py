"""Words the verdict on a recorded run, as lines of text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from glm4ft.data.chat_format import IGNORED
from glm4ft.testing.replay.step import Departure
from glm4ft.testing.trial.recorded import JUDGED_STAGES, JudgedRecording
from glm4ft.testing.trial.recorded_rows import untrained_answers
from glm4ft.testing.trial.wording import LOOK_AT
from glm4ft.text.safe_text import visible

SHOWN_ROWS = 2
# The claim of each stage, in the form of the names of checks.
CLAIMS = {
    "rows": "exactly_what_the_model_must_sample_is_trained",
    "batches": "rows_are_what_they_are_alone",
    "model": "the_model_is_the_base_with_the_requested_adapters",
    "gradient": "the_gradient_is_that_of_the_token_mean",
    "clipping": "the_gradient_is_clipped_by_its_global_norm",
    "schedule": "the_learning_rate_follows_the_requested_schedule",
    "update": "the_update_is_that_of_adamw",
}


def lines(judged: JudgedRecording) -> Iterator[str]:
    """The verdict as lines of text: what was recorded, what was trained, and each stage."""
    processes = f"{judged.num_processes} process{'es' * (judged.num_processes != 1)}"
    yield f"{judged.num_steps} optimizer steps of {processes}, {len(judged.rows)} different rows"
    if shown := list(shown_rows(judged)):
        yield "trained tokens in brackets:"
        yield from (f"  {text}" for text in shown)
    if judged.marks and (counts := untrained_answers(judged.rows, judged.marks))["untrained"]:
        yield f"{counts['untrained']} of {counts['answers']} answers are not trained at all"
    for stage in JUDGED_STAGES:
        for departure in judged.verdict.at(stage):
            yield f"{stage:9} DEPARTS  {visible(str(departure), newlines=False)}"
        if judged.verdict.at(stage):
            yield f"{'':9} look at  {LOOK_AT[stage]}"
        else:
            yield f"{stage:9} {_state(judged, stage)}"
    if cost := cost_line(judged):
        yield cost


def _state(judged: JudgedRecording, stage: str) -> str:
    if why := judged.reason(stage):
        loss = "the weights of tokens in the loss agree; the rest is " if _judges_loss_alone(judged, stage) else ""
        return f"{loss}not judged: {why}"
    size = judged.verdict.largest.get(stage)
    return "agrees" + (f"   largest relative difference {size:.1e}" if size is not None else "")


def _judges_loss_alone(judged: JudgedRecording, stage: str) -> bool:
    return stage == "gradient" and stage in judged.not_judged and "loss" not in judged.not_judged


def shown_rows(judged: JudgedRecording) -> Iterator[str]:
    """The first rows as text, with each run of trained tokens in brackets."""
    for row in judged.rows[:SHOWN_ROWS] if judged.reference else ():
        parts = []
        for is_trained, run in groupby(zip(row.ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORED):
            text = visible(judged.reference.tokenizer.decode([id for id, _ in run]), newlines=False)
            parts.append(f"[{text}]" if is_trained else text)
        yield "".join(parts)


def cost_line(judged: JudgedRecording) -> str:
    """What recording cost; "" if no step was recorded."""
    overhead = judged.about.get("overhead") or {}
    if not overhead.get("step_s"):
        return ""
    share = sum(overhead["hooks_s"]) / sum(overhead["step_s"])
    return (
        f"recording took {share:.0%} of the recorded steps' time; the trace has {overhead['trace_bytes'] / 1e6:.1f} MB"
    )


def record(judged: JudgedRecording) -> dict[str, Any]:
    """The verdict in the form that ``glm4ft judge --json`` writes."""
    first = judged.verdict.departure
    return {
        "schema": 1,
        "subject": judged.about.get("command", ""),
        "steps": judged.num_steps,
        "processes": judged.num_processes,
        "rows": len(judged.rows),
        "first_departure": None if first is None else first.stage,
        "checks": [check for stage in JUDGED_STAGES for check in _checks(judged, stage)],
        "seconds": round(judged.seconds, 3),
    }


def _checks(judged: JudgedRecording, stage: str) -> Iterator[dict[str, Any]]:
    found = judged.verdict.at(stage)
    for departure in found:
        yield _check(judged, stage, "failed", str(departure), departure)
    if not found:
        why = judged.reason(stage)
        yield _check(judged, stage, "skipped" if why else "passed", why)


def _check(
    judged: JudgedRecording, stage: str, status: str, message: str, departure: Departure | None = None
) -> dict[str, Any]:
    return {
        "check": CLAIMS[stage],
        "stage": stage,
        "status": status,
        "message": message,
        "step": departure.step if departure else None,
        "size": departure.size if departure else judged.verdict.largest.get(stage),
        "limit": judged.verdict.limits.get(stage),
        "cause": departure.cause if departure else "",
    }
