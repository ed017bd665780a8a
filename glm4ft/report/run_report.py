"""The report of a training run: ``report.html`` and ``summary.md`` in its output folder."""

from __future__ import annotations

import contextlib
import itertools
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from glm4ft.data.encoded_row import EncodedRow
from glm4ft.data.encoded_rows import TrainedRow
from glm4ft.diagnosis.evidence import RowEvidence
from glm4ft.diagnosis.measure import gather_evidence
from glm4ft.diagnosis.round_trip import RoundTripObserver
from glm4ft.diagnosis.rules import Diagnosis, diagnose
from glm4ft.diagnosis.trainer_logs import ended_by_patience
from glm4ft.errors import RunError
from glm4ft.floors.floor import Floor
from glm4ft.model.generation import TurnRoundTrip
from glm4ft.model.quantisation import describe_quantised
from glm4ft.report.content import Content, Curves, Headline, ShownOption, ShownRow, ShownTurn
from glm4ft.report.costly_tokens import part_counts
from glm4ft.report.files import HTML_FILE, write_report
from glm4ft.report.run_card import write_run_card
from glm4ft.report.wording import diagnosed_run, failed_run, finished_run, supervised_sentence
from glm4ft.train.best import describe_evaluations, log_of_adapter, read_best
from glm4ft.train.config import TrainConfig
from glm4ft.train.observer import PreparedRun, RunObserver
from glm4ft.train.trajectory import FILE_NAME, Trajectory, read_trajectory

SHOWN_ROWS = 8


class RunReport(RunObserver):
    """Writes ``report.html`` and ``summary.md`` when a run ends, or has to stop.

    Args:
        sources: Options mapped to where their values came from.
        round_trip: The observer whose results are shown, if there is one; it has to come before the report.
    """

    def __init__(self, sources: Mapping[str, str] | None = None, round_trip: RoundTripObserver | None = None) -> None:
        self.sources, self.round_trip = sources or {}, round_trip
        self.content: Content | None = None  # what was written last; None on a process that writes nothing

    def is_done(self, output: Path) -> bool:
        """Whether the page is there."""
        return (output / HTML_FILE).exists()

    def on_end(self, run: PreparedRun) -> None:
        """Write the report; without losses of single tokens where no process holds the whole model."""
        self._write(run, None if run.is_sharded else run.model)

    def on_failure(self, run: PreparedRun, error: RunError) -> None:
        """Report what is known when the run has to stop."""
        # the other processes of a distributed run do not know that this one broke, and would not join a forward pass
        with contextlib.suppress(OSError):  # on a full disk the run's own error says more
            self._write(run, None if run.is_distributed else run.model, error=str(error))

    def _write(self, run: PreparedRun, model: Any, *, error: str = "") -> None:
        if not run.is_main_process:
            return
        turns = self.round_trip.turns if self.round_trip else ()
        try:
            content = run_content(run, model, turns, sources=self.sources, error=error)
        except torch.OutOfMemoryError:  # the adapter is saved; what is left is to say so without measuring it
            content = run_content(run, None, turns, sources=self.sources, error=error)
        write_report(run.output, content)
        if not error:
            write_run_card(run, content, read_trajectory(run.output / FILE_NAME))
        self.content = content


def run_content(
    run: PreparedRun,
    model: Any,
    turns: Sequence[TurnRoundTrip] = (),
    *,
    sources: Mapping[str, str] | None = None,
    error: str = "",
) -> Content:
    """What the report of a run shows.

    Args:
        run: The run, with its trajectory on disk.
        model: The model as trained; None if it cannot be run, so that no token's loss is shown.
        turns: The results of the round trip, one per assistant turn.
        sources: Options mapped to where their values came from.
        error: The error that stopped the run; "" if none did.
    """
    trajectory = read_trajectory(run.output / FILE_NAME)
    encoded = [run.rows.encoded(index) for index in range(min(SHOWN_ROWS, len(run.rows)))]
    diagnosis = _diagnose(run, encoded, log_of_adapter(run.output), model, turns)
    evidence = diagnosis.evidence
    rows = tuple(map(shown_row, encoded, evidence.rows if model is not None else itertools.repeat(None)))
    counts = part_counts(rows, run.chat_format.tokenizer)
    supervised = supervised_sentence(run.data, counts, num_shown=len(rows))
    return Content(
        title=f"glm4ft training run · {run.output.name}",
        headline=_headline(run, trajectory, diagnosis, supervised, error),
        tokenizer=run.chat_format.tokenizer,
        curves=_curves(run, trajectory, evidence.floor),
        counts=counts,
        rows=rows,
        num_rows=run.data.rows,
        turns=tuple(shown_turn(turn) for turn in turns),
        facts=tuple(_facts(run, trajectory)),
        options=tuple(_options(run.config, sources or {})),
        command=f"glm4ft train --config {shlex.quote(str(run.output / 'config.yaml'))} --output NEW_FOLDER",
    )


def _diagnose(
    run: PreparedRun,
    encoded: Sequence[EncodedRow],
    log: Sequence[Mapping[str, Any]],
    model: Any,
    turns: Sequence[TurnRoundTrip],
) -> Diagnosis:
    return diagnose(
        gather_evidence(
            model,
            [TrainedRow(row.line, row.input_ids, row.labels) for row in encoded],
            run.chat_format.tokenizer,
            log,
            round_trips=turns,
            target_loss=run.config.target,
            options={
                **asdict(run.config),
                "target_modules": list(run.adapters.num_adapted),
                "patience_ended": ended_by_patience(run.output),
            },
            num_dropped=sum(map(len, run.data.dropped.values())),
            num_cut=len(run.data.truncated),
            num_rows=run.data.rows,
        )
    )


def _headline(run: PreparedRun, trajectory: Trajectory, diagnosis: Diagnosis, supervised: str, error: str) -> Headline:
    if error:
        return failed_run(error, supervised)
    evaluations = describe_evaluations(trajectory.evaluations, read_best(run.output))
    account = finished_run(trajectory.steps, run.config.target, diagnosis.evidence.round_trips, supervised, evaluations)
    return diagnosed_run(diagnosis, account)


def _curves(run: PreparedRun, trajectory: Trajectory, floor: Floor | None) -> Curves:
    return Curves.of(
        trajectory.steps,
        trajectory.evaluations,
        target=run.config.target,
        # the bound of some rows bounds nothing of the others
        floor=floor.floor if floor and run.data.rows <= SHOWN_ROWS else None,
        clip=run.config.max_grad_norm or None,
    )


def _facts(run: PreparedRun, trajectory: Trajectory) -> Iterator[tuple[str, str]]:
    header, steps = trajectory.header, trajectory.steps
    yield "data", run.data.describe()
    yield "adapter", run.adapters.describe()
    if run.config.quantise:
        yield "base", describe_quantised(run.model)
    if steps:
        seconds, tokens = sum(step["step_s"] for step in steps), sum(step["tokens"] for step in steps)
        yield "steps", f"{len(steps):,} in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
        yield "peak memory", f"{max(step['peak_memory_bytes'] for step in steps) / 2**20:,.0f} MiB"
    yield "device", str(header.get("device", ""))
    yield "versions", ", ".join(f"{name} {number}" for name, number in header.get("libraries", {}).items())
    yield "system", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "digest of the rows", str(header.get("rows_sha256", ""))


def shown_row(row: EncodedRow, measured: RowEvidence | None = None) -> ShownRow:
    """A row of our own encoder, beside what should be supervised by its turns.

    Args:
        row: The row as encoded.
        measured: What the model makes of it.
    """
    shown = ShownRow(f"line {row.line}", row.input_ids, row.supervised, row.expected)
    if measured is None:
        return shown
    tokens = measured.tokens  # all but the first
    return replace(
        shown,
        losses=[None, *(token.loss for token in tokens)],
        floors=[None, *(token.floor for token in tokens)],
        said=[None, *(token.predicted_id for token in tokens)],
    )


def shown_turn(turn: TurnRoundTrip) -> ShownTurn:
    """A turn of the round trip."""
    title = f"line {turn.line}, messages[{turn.message}]"
    return ShownTurn(title, turn.expected, turn.generated, turn.exact, turn.supervised, turn.stop)


def _options(config: TrainConfig, sources: Mapping[str, str]) -> Iterator[ShownOption]:
    values, default = asdict(config), asdict(TrainConfig())
    values["learning_rate"] = config.peak_learning_rate
    for name, value in values.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                is_default = inner == default[name][key]
                source = sources.get(f"{name}.{key}", sources.get(name, "default" if is_default else "given"))
                yield ShownOption(f"{name}.{key}", _show(inner), source)
        else:
            is_default = getattr(config, name) == default[name]
            yield ShownOption(name, _show(value), sources.get(name, "default" if is_default else "given"))


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == {} else f"{value:g}" if isinstance(value, float) else str(value)
