"""The report of a training run: ``report.html`` and ``summary.md`` in its output folder."""

from __future__ import annotations

import contextlib
import itertools
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glm4ft.chat_format import ChatFormat, Row
from glm4ft.config import TrainConfig
from glm4ft.conversation import read_conversations
from glm4ft.dataset import DataReport, data_path, fit_row
from glm4ft.errors import RunError
from glm4ft.generation import TurnRoundTrip
from glm4ft.report.content import Content, Curves, Headline, Option, ShownRow, ShownTurn
from glm4ft.report.files import write_report
from glm4ft.report.measurement import measure_targets
from glm4ft.report.token_losses import part_counts
from glm4ft.report.wording import failed_run, finished_run, supervised_sentence
from glm4ft.trajectory import FILE_NAME, Trajectory, read_trajectory

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
        content = self.content(model, round_trips, error=error)
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
        rows = tuple(shown_row(row, model) for row in itertools.islice(self._encoded(), SHOWN_ROWS))
        counts = part_counts(rows, self.chat_format.tokenizer)
        supervised = supervised_sentence(self.data, counts, num_shown=len(rows))
        return Content(
            title=f"glm4ft training run · {self.output.name}",
            headline=self._headline(trajectory, round_trips, supervised, error),
            tokenizer=self.chat_format.tokenizer,
            curves=self._curves(trajectory),
            counts=counts,
            rows=rows,
            num_rows=self.data.rows,
            turns=tuple(shown_turn(turn) for turn in round_trips),
            facts=tuple(self._facts(trajectory)),
            options=tuple(_options(self.config, self.sources)),
            command=f"glm4ft train --config {self.output}/config.yaml --output NEW_FOLDER",
        )

    def _headline(
        self, trajectory: Trajectory, round_trips: Sequence[TurnRoundTrip], supervised: str, error: str
    ) -> Headline:
        if error:
            return failed_run(error, supervised)
        return finished_run(trajectory.steps, self.config.target, round_trips, supervised)

    def _encoded(self) -> Iterator[Row]:
        for conversation in read_conversations(data_path(str(self.config.data))):
            row, _ = fit_row(conversation, self.chat_format, self.config.max_length)
            if row:
                yield row

    def _curves(self, trajectory: Trajectory) -> Curves:
        return Curves.of(
            trajectory.steps,
            trajectory.evaluations,
            target=self.config.target,
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


def shown_row(row: Row, model: Any = None) -> ShownRow:
    """A row of our own encoder; what should be supervised is what its segments say."""
    expected = [segment.supervised for segment in row.segments for _ in range(segment.start, segment.end)]
    targets = [at for at, keep in enumerate(row.supervised) if keep]
    losses, said = measure_targets(model, row.input_ids, targets) if model is not None else ([], [])
    return ShownRow(f"line {row.line}", row.input_ids, row.supervised, expected, losses, said=said)


def shown_turn(turn: TurnRoundTrip) -> ShownTurn:
    """A turn of the round trip."""
    title = f"line {turn.line}, messages[{turn.message}]"
    return ShownTurn(title, turn.expected, turn.generated, turn.exact, turn.supervised, turn.stop)


def _options(config: TrainConfig, sources: Mapping[str, str]) -> Iterator[Option]:
    values, default = asdict(config), asdict(TrainConfig())
    values["learning_rate"] = config.peak_learning_rate
    for name, value in values.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                is_default = inner == default[name][key]
                source = sources.get(f"{name}.{key}", sources.get(name, "default" if is_default else "given"))
                yield Option(f"{name}.{key}", _show(inner), source)
        else:
            is_default = getattr(config, name) == default[name]
            yield Option(name, _show(value), sources.get(name, "default" if is_default else "given"))


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == {} else f"{value:g}" if isinstance(value, float) else str(value)
