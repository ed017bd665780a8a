"""Words the verdict on a recorded run, as lines of text, as JSON, and as the content of a report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from glm4ft.data.encoded_row import IGNORED
from glm4ft.files import finite_or_null
from glm4ft.report.content import Content, ShownRow
from glm4ft.report.costly_tokens import part_counts
from glm4ft.report.wording import parts_sentence
from glm4ft.testing.trial.recorded import JUDGED_STAGES, JudgedRecording
from glm4ft.testing.trial.recorded_rows import untrained_answers
from glm4ft.testing.trial.wording import LOOK_AT, headline, shown_check
from glm4ft.text.safe_text import visible

SHOWN_ROWS, REPORTED_ROWS = 2, 8
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
            if departure.size is not None and (limit := judged.verdict.limits.get(stage)):
                yield f"{'':9} rounding  explains a relative difference of at most {limit:.1e}"
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
    if size is None:
        return "agrees"
    return f"agrees   largest relative difference {size:.1e}, limit {judged.verdict.limits[stage]:.1e}"


def _judges_loss_alone(judged: JudgedRecording, stage: str) -> bool:
    return stage == "gradient" and stage in judged.not_judged and "loss" not in judged.not_judged


def shown_rows(judged: JudgedRecording) -> Iterator[str]:
    """The first rows as text, with each run of trained tokens in brackets."""
    tokenizer: Any = judged.reference and judged.reference.tokenizer
    for row in judged.rows[:SHOWN_ROWS]:
        parts = []
        for is_trained, run in groupby(zip(row.ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORED):
            text = visible(tokenizer.decode([id for id, _ in run]), newlines=False)
            parts.append(f"[{text}]" if is_trained else text)
        yield "".join(parts)


def cost_line(judged: JudgedRecording) -> str:
    """What recording cost; "" if no step was recorded."""
    overhead = judged.about.get("overhead") or {}
    if not overhead.get("step_s"):
        return ""
    share, size = sum(overhead["hooks_s"]) / sum(overhead["step_s"]), overhead["trace_bytes"] / 1e6
    return f"recording took {share:.0%} of the recorded steps' time; the trace has {size:.1f} MB"


@dataclass(frozen=True)
class StageResult:
    """What a recording shows of one stage, in the form of the result of a check.

    Args:
        check: The claim.
        stage: The stage.
        status: ``passed``, ``failed``, or ``skipped`` if it was not judged.
        message: The departure, or why the stage was not judged.
        cause: The likely cause; "" if none was found.
        step: The step of the departure; None without one.
        size: The largest relative difference; None if the stage is not judged by a number.
        limit: The largest relative difference that passes.
    """

    check: str
    stage: str
    status: str
    message: str = ""
    cause: str = ""
    step: int | None = None
    size: float | None = None
    limit: float | None = None


def stage_results(judged: JudgedRecording) -> Iterator[StageResult]:
    """The result of each stage: one for each departure, or one."""
    for stage in JUDGED_STAGES:
        limit, claim = judged.verdict.limits.get(stage), CLAIMS[stage]
        found = judged.verdict.at(stage)
        for d in found:
            yield StageResult(claim, stage, "failed", str(d), d.cause, d.step, d.size, limit)
        if not found:
            why, size = judged.reason(stage), judged.verdict.largest.get(stage)
            yield StageResult(claim, stage, "skipped" if why else "passed", why, size=size, limit=limit)


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
        "checks": [finite_or_null(asdict(result)) for result in stage_results(judged)],
        "seconds": round(judged.seconds, 3),
    }


def content_of(judged: JudgedRecording, command: str) -> Content:
    """The content of the report on a recorded run.

    Args:
        judged: The verdict.
        command: The command that judges the recording again.
    """
    results = list(stage_results(judged))
    rows = tuple(
        ShownRow(f"row first trained in step {row.step}", row.ids, [label != IGNORED for label in row.labels])
        for row in judged.rows[:REPORTED_ROWS]
    )
    tokenizer: Any = judged.reference and judged.reference.tokenizer
    counts = part_counts(rows, tokenizer) if rows else {}
    return Content(
        title=f"glm4ft judge · {judged.about.get('command') or 'a recorded run'}",
        headline=headline(results, parts_sentence(counts) if counts else ""),
        tokenizer=tokenizer,
        counts=counts,
        rows=rows,
        num_rows=len(judged.rows),
        checks=tuple(shown_check(result) for result in results),
        facts=tuple(_facts(judged)),
        command=command,
    )


def _facts(judged: JudgedRecording) -> Iterator[tuple[str, str]]:
    model, versions = judged.about["model"], judged.about["versions"]
    processes = f"{judged.num_processes} of {judged.about['world_size']} processes"
    yield "recorded", f"{judged.num_steps} optimizer steps of {processes}"
    yield "model", f"{model['class']} on {model['base'] or 'an unnamed base'}"
    yield "trainer", str(judged.about["configuration"].get("trainer") or "a loop without a known trainer")
    if cost := cost_line(judged):
        yield "cost", cost
    yield "versions", ", ".join(f"{name} {number}" for name, number in versions.items())
