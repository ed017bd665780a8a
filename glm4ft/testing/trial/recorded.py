"""Judges the recording of any training command: there is no subject and no plan, only what the run itself did.

Rows and labels are read back from the recording: ids from the embedding, labels and weights from the loss's gradient at
the final norm. What a plan would state is taken from the run's own configuration, and where that states nothing, from
its optimizer and its gradients: a stage is then judged for agreement with itself and with the specification.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm4ft.errors import InputError
from glm4ft.testing.recording.discovery import NotFound
from glm4ft.testing.recording.environment import NOTE
from glm4ft.testing.recording.merging import first_difference, merge_ranks
from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.recording.trace_file import TRACE, read_trace
from glm4ft.testing.replay.departure import Departure
from glm4ft.testing.replay.replay import JUDGES, Verdict, replay
from glm4ft.testing.replay.rounding import measured_limits
from glm4ft.testing.specification.chat_template import Marks, marks_of
from glm4ft.testing.specification.lora_spec import LoraSpec
from glm4ft.testing.specification.mask_oracle import Undecidable
from glm4ft.testing.specification.reference import LabelledIds, Reference
from glm4ft.testing.specification.routed_experts import require_recent_libraries
from glm4ft.testing.trial.recorded_plan import plan_of, unjudged
from glm4ft.testing.trial.recorded_rows import (
    TrainedRow,
    expected_rows,
    has_answers,
    stop_ids,
    template_departures,
    trained_rows,
)
from glm4ft.testing.trial.recorded_settings import settings_departures
from glm4ft.testing.trial.stages import STAGES

UNSTATED_WEIGHTS = (
    "tokens of one row differ in their weight in the loss, and a recording does not say which weights were asked for; "
    "put the trainer on trial with a subject whose encode returns them"
)
UNDECIDED = (
    "the loss is the sum over the tokens, and whether the gradient is divided by their number before it is clipped "
    "makes no difference in these steps, since all are clipped"
)
JUDGED_STAGES = STAGES[: STAGES.index("side-effects")]  # what the first steps of a run can show


@dataclass(frozen=True)
class JudgedRecording:
    """The verdict on a recorded run.

    Args:
        verdict: The result of the replay.
        about: What is known of the run beside its tensors.
        rows: The rows that the run trained on, with the labels that it trained.
        not_judged: The reason for each stage, or judge of the replay, that was not judged.
        num_steps: The number of recorded optimizer steps.
        num_processes: The number of processes that were recorded.
        reference: The specification on the run's base; None if nothing could be compared with it.
        marks: The tokens around an answer in the base's template; None if they are unknown.
        seconds: The time that judging took.
    """

    verdict: Verdict
    about: Mapping[str, Any]
    rows: Sequence[TrainedRow] = ()
    not_judged: Mapping[str, str] = field(default_factory=dict)
    num_steps: int = 0
    num_processes: int = 1
    reference: Reference | None = None
    marks: Marks | None = None
    seconds: float = 0.0

    def reason(self, stage: str) -> str:
        """Why a stage was not judged; "" if it was."""
        if why := self.not_judged.get(stage, ""):
            return why
        by = self.verdict.hidden.get(stage)
        return f"a departure at {by} hides it" if by else ""


def judge_recording(folder: Path, base_dir: str = "", data: str | None = None) -> JudgedRecording:
    """Compare a recorded run with the specification.

    Args:
        folder: The folder that ``glm4ft record`` wrote.
        base_dir: The model folder of the base; by default the one that the run loaded.
        data: The conversations that the run trained on; None to judge rows by the base's chat template alone.
    Raises:
        InputError: If nothing was recorded, the base is not there, or it has experts and a library is too old to be
            judged, here or where the run was recorded.
        DataError: If the conversations cannot be read.
    """
    began_s = time.perf_counter()
    traces, about = read_recording(folder)
    if not traces[0].steps:
        return JudgedRecording(_without_a_step(traces[0], folder), about, num_processes=len(traces))
    if traces[0].sharded and len(traces) < about["world_size"]:
        raise InputError(
            "the parameters are split over the processes, so the recording of each is needed", where=str(folder),
            found=f"{len(traces)} recordings of {about['world_size']} processes: {'; '.join(about['not_recorded'])}",
        )  # fmt: skip
    trace = merge_ranks(traces) if len(traces) > 1 else traces[0]
    reference = reference_of(about, base_dir)
    require_recent_libraries(Path(reference.base_dir), about.get("versions", {}), by="recorded")
    require_recent_libraries(Path(reference.base_dir))
    if trace.sampled:
        trace.steps[0].whole = reference.first_weights(trace)
    rows, not_judged = trained_rows(trace, reference), unjudged(trace, about, len(traces))
    marks, why = _marks(reference)
    known, why = _known_rows(rows, reference, marks, data) if data else ([], why)
    if not known and not (marks and has_answers(rows, marks)):
        not_judged["rows"] = why or "no row has the assistant header of the base's chat template"
    differ, alike = _ranks_differ(traces), trace
    if differ:  # from then on each process trains a model of its own
        alike = replace(trace, steps=trace.steps[: differ[0].step])
        not_judged["clipping"] = "the processes clip different gradients"
    plan, own = plan_of(trace, about["configuration"], len(traces)), [(r.ids, r.labels) for r in rows if r.ids]
    limits = measured_limits(reference, trace, own)
    verdict = replay(alike, reference, known or own, plan, not_judged, limits)
    if known and "rows" in verdict.departures:
        verdict = _rows_of(verdict, replay(alike, reference, own, plan, [*not_judged, "rows"], limits))
    if verdict.is_undecided:
        not_judged["gradient"] = UNDECIDED
    if verdict.has_unstated_weights:
        not_judged["gradient"] = UNSTATED_WEIGHTS
    more = [*settings_departures(trace, about, reference, verdict.packed), *differ]
    if marks and not known:
        more += template_departures(rows, reference, marks)
    verdict = _with(verdict, more)
    return JudgedRecording(
        verdict, about, rows, not_judged, len(trace.steps), len(traces), reference, marks,
        time.perf_counter() - began_s,
    )  # fmt: skip


def _rows_of(told: Verdict, judged: Verdict) -> Verdict:
    """The verdict on the rows that the run made of its data, with what that of the data says of the rows."""
    judged.more["rows"] = told.at("rows")[1:]
    judged.hidden.pop("rows", None)
    return _with(judged, told.at("rows")[:1])


def _with(verdict: Verdict, more: Sequence[Departure]) -> Verdict:
    """The verdict with further departures, in the order of the steps and stages."""
    for departure in more:
        later = verdict.departures.get(departure.stage)
        if later and departure.step < later.step:
            verdict.departures[departure.stage], departure = departure, later
        verdict.add(departure)
        for stage in departure.hides_later:
            if stage in verdict.departures and verdict.departures[stage].step >= departure.step:
                del verdict.departures[stage]
                verdict.hidden[stage] = departure.stage
    first = sorted(verdict.departures.values(), key=lambda d: (d.step, STAGES.index(d.stage)))
    verdict.departures = {departure.stage: departure for departure in first}
    return verdict


def _ranks_differ(traces: Sequence[Trace]) -> list[Departure]:
    number, text = first_difference(traces)
    return [Departure("gradient", number, text, "gradients are not averaged over the processes")] if number else []


def _known_rows(
    rows: Sequence[TrainedRow], reference: Reference, marks: Marks | None, data: str
) -> tuple[list[LabelledIds], str]:
    """The rows that the data should be encoded as, and if there are none, the reason."""
    try:
        return expected_rows(data, reference, marks, rows), ""
    except Undecidable as error:
        return [], str(error)


def _marks(reference: Reference) -> tuple[Marks | None, str]:
    try:
        return marks_of(reference.tokenizer, stop_ids(Path(reference.base_dir))), ""
    except (Undecidable, OSError) as error:
        return None, str(error)


def _without_a_step(trace: Trace, folder: Path) -> Verdict:
    """The verdict on a run whose forward passes were recorded, but no step of an optimizer that trains the model."""
    if not trace.foreign_steps:
        raise _nothing(folder, "forward passes, but the run ended before its first optimizer step")
    text = f"{trace.foreign_steps} steps of an optimizer that holds none of the {len(trace.trained)} trained parameters"
    return Verdict(departures={"update": Departure("update", 1, text)}, hidden=dict.fromkeys(JUDGES, "update"))


def read_recording(folder: Path) -> tuple[list[Trace], dict[str, Any]]:
    """Read what ``glm4ft record`` wrote.

    Args:
        folder: The folder that it wrote.
    Returns:
        The trace of each process, and what the first knew of its run.
    Raises:
        InputError: If nothing was recorded.
    """
    ranks = sorted(folder.glob("rank-*"), key=lambda path: int(path.name.partition("-")[2]))
    notes = [(rank / NOTE).read_text("utf-8").strip() for rank in ranks if (rank / NOTE).exists()]
    found = [read_trace(rank) for rank in ranks if (rank / TRACE).exists()]
    if not found:
        raise _nothing(folder, "; ".join(dict.fromkeys(notes)) or "no trace of any process")
    return [trace for trace, _ in found], {**found[0][1], "not_recorded": notes}


def _nothing(folder: Path, found: str) -> InputError:
    return InputError(
        "nothing was recorded", where=str(folder), found=found,
        expected="a folder of glm4ft record, of a command that took an optimizer step",
    )  # fmt: skip


def reference_of(about: Mapping[str, Any], base_dir: str = "") -> Reference:
    """The specification on the base of a recorded run.

    Args:
        about: What is known of the run.
        base_dir: The model folder of the base; by default the one that the run loaded.
    Raises:
        InputError: If the base is not there, or the run's adapter is of a kind that the specification does not cover.
    """
    name = base_dir or about["model"]["base"]
    if not (name and Path(name, "config.json").is_file()):
        raise InputError(
            "the base is not a model folder on this machine", found=name or "nothing", expected="a model folder",
            fix="name it with --model",
        )  # fmt: skip
    try:
        return Reference(Path(name), LoraSpec.of(about["model"]["adapter"] or {"r": 1, "lora_alpha": 1}))
    except NotFound as error:
        raise InputError("the base cannot be judged", where=name, found=str(error)) from None
    except ValueError as error:
        raise InputError(
            "the run's adapter cannot be judged", found=str(error), expected="LoRA, rsLoRA or DoRA"
        ) from None
