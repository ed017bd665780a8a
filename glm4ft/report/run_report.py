"""The report of a training run: ``report.html`` and ``summary.md`` in its output folder."""

from __future__ import annotations

import contextlib
import itertools
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from glm4ft.data.chat_format import ChatFormat, EncodedRow
from glm4ft.data.conversation import read_conversations
from glm4ft.data.dataset import DataReport, data_path, fit_row
from glm4ft.data.encoded_rows import TrainedRow
from glm4ft.diagnosis.evidence import RowEvidence
from glm4ft.diagnosis.measure import gather_evidence
from glm4ft.diagnosis.rules import Diagnosis, diagnose
from glm4ft.errors import RunError
from glm4ft.floors.floor import Floor
from glm4ft.model.generation import TurnRoundTrip
from glm4ft.report.content import Content, Curves, Headline, ShownOption, ShownRow, ShownTurn
from glm4ft.report.costly_tokens import part_counts
from glm4ft.report.files import write_report
from glm4ft.report.wording import diagnosed_run, failed_run, finished_run, supervised_sentence
from glm4ft.train.config import TrainConfig
from glm4ft.train.trajectory import FILE_NAME, Trajectory, read_trajectory

SHOWN_ROWS = 8


@dataclass
class RunReport:
    """What is known of a run before its first step; ``write`` adds what came of it.

    Args:
        output: folder of the run.
        config: its options.
        chat_format: encoded its data.
        data: what became of its conversations.
        adapter: the account of what is trained.
        sources: option to where its value came from.
        is_written: False where another process writes.
    """

    output: Path
    config: TrainConfig
    chat_format: ChatFormat
    data: DataReport
    adapter: str
    sources: Mapping[str, str] = field(default_factory=dict)
    is_written: bool = True

    def write(self, model: Any = None, round_trips: Sequence[TurnRoundTrip] = (), *, error: str = "") -> Content | None:
        """Write page and summary.

        Args:
            model: as trained; without one no token's loss is shown.
            round_trips: one per assistant turn.
            error: that stopped the run, if one did.
        Returns:
            What they show; None where another process writes.
        """
        if not self.is_written:
            return None
        try:
            content = self.content(model, round_trips, error=error)
        except torch.OutOfMemoryError:  # the adapter is saved; what is left is to say so without measuring it
            content = self.content(None, round_trips, error=error)
        write_report(self.output, content)
        return content

    @contextlib.contextmanager
    def of_a_broken_run(self, model: Any) -> Iterator[None]:
        """Report what is known when the run has to stop; the error goes on.

        Args:
            model: that is trained; None if it cannot be run now.
        """
        try:
            yield
        except RunError as error:
            with contextlib.suppress(OSError):  # on a full disk the run's own error says more
                self.write(model, error=str(error))
            raise

    def content(self, model: Any = None, round_trips: Sequence[TurnRoundTrip] = (), *, error: str = "") -> Content:
        """What the report shows; arguments as for ``write``."""
        trajectory = read_trajectory(self.output / FILE_NAME)
        encoded = list(itertools.islice(self._encoded(), SHOWN_ROWS))
        diagnosis = self._diagnose(encoded, trajectory, model, round_trips)
        evidence = diagnosis.evidence
        rows = tuple(map(shown_row, encoded, evidence.rows if model is not None else itertools.repeat(None)))
        counts = part_counts(rows, self.chat_format.tokenizer)
        supervised = supervised_sentence(self.data, counts, num_shown=len(rows))
        return Content(
            title=f"glm4ft training run · {self.output.name}",
            headline=self._headline(trajectory, diagnosis, supervised, error),
            tokenizer=self.chat_format.tokenizer,
            curves=self._curves(trajectory, evidence.floor),
            counts=counts,
            rows=rows,
            num_rows=self.data.rows,
            turns=tuple(shown_turn(turn) for turn in round_trips),
            facts=tuple(self._facts(trajectory)),
            options=tuple(_options(self.config, self.sources)),
            command=f"glm4ft train --config {shlex.quote(str(self.output / 'config.yaml'))} --output NEW_FOLDER",
        )

    def _diagnose(
        self, encoded: Sequence[EncodedRow], trajectory: Trajectory, model: Any, round_trips: Sequence[TurnRoundTrip]
    ) -> Diagnosis:
        return diagnose(
            gather_evidence(
                model,
                [TrainedRow(row.line, row.input_ids, row.labels) for row in encoded],
                self.chat_format.tokenizer,
                trajectory.steps,
                round_trips=round_trips,
                target_loss=self.config.target,
                options={**asdict(self.config), "target_modules": self.config.lora.targets},
                num_dropped=sum(map(len, self.data.dropped.values())),
                num_cut=len(self.data.truncated),
                num_rows=self.data.rows,
            )
        )

    def _headline(self, trajectory: Trajectory, diagnosis: Diagnosis, supervised: str, error: str) -> Headline:
        if error:
            return failed_run(error, supervised)
        account = finished_run(trajectory.steps, self.config.target, diagnosis.evidence.round_trips, supervised)
        return diagnosed_run(diagnosis, account)

    def _encoded(self) -> Iterator[EncodedRow]:
        for conversation in read_conversations(data_path(str(self.config.data))):
            row, _ = fit_row(conversation, self.chat_format, self.config.max_length)
            if row:
                yield row

    def _curves(self, trajectory: Trajectory, floor: Floor | None) -> Curves:
        return Curves.of(
            trajectory.steps,
            trajectory.evaluations,
            target=self.config.target,
            # the bound of some rows bounds nothing of the others
            floor=floor.floor if floor and self.data.rows <= SHOWN_ROWS else None,
            clip=self.config.max_grad_norm or None,
        )

    def _facts(self, trajectory: Trajectory) -> Iterator[tuple[str, str]]:
        header, steps = trajectory.header, trajectory.steps
        yield "data", self.data.describe()
        yield "adapter", self.adapter
        if steps:
            seconds, tokens = sum(step["step_s"] for step in steps), sum(step["tokens"] for step in steps)
            yield "steps", f"{len(steps):,} in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
            yield "peak memory", f"{max(step['peak_memory_bytes'] for step in steps) / 2**20:,.0f} MiB"
        yield "device", str(header.get("device", ""))
        yield "versions", ", ".join(f"{name} {number}" for name, number in header.get("libraries", {}).items())
        yield "system", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
        yield "digest of the rows", str(header.get("rows_sha256", ""))


def shown_row(row: EncodedRow, measured: RowEvidence | None = None) -> ShownRow:
    """A row of our own encoder; what should be supervised is what its segments say.

    Args:
        row: as encoded.
        measured: what the model makes of it.
    """
    expected = [segment.supervised for segment in row.segments for _ in range(segment.start, segment.end)]
    shown = ShownRow(f"line {row.line}", row.input_ids, row.supervised, expected)
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
