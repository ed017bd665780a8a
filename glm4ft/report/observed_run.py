"""A training run with all that watches it: floors before it, round trip and report after it, and the account of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from glm4ft.data.data_report import DataReport
from glm4ft.diagnosis.round_trip import RoundTripObserver
from glm4ft.diagnosis.run_folder import RowsKeeper
from glm4ft.floors.target import FloorObserver
from glm4ft.model.generation import TurnRoundTrip
from glm4ft.report.content import Content
from glm4ft.report.failure_card import explain_failure
from glm4ft.report.files import HTML_FILE
from glm4ft.report.run_report import RunReport
from glm4ft.train.best import describe_evaluations, read_best
from glm4ft.train.config import TrainConfig
from glm4ft.train.observer import PreparedRun, RunObserver
from glm4ft.train.run import RunResult, run_training
from glm4ft.train.trajectory import Trajectory


@dataclass(frozen=True)
class ObservedRun:
    """What came of a run, and what its observers found.

    Args:
        result: The results of the training.
        round_trips: One result per assistant turn, if they were asked for.
        content: What the report shows; None where this process wrote none.
        data: What became of the conversations; None for a run that was complete already.
    """

    result: RunResult
    round_trips: tuple[TurnRoundTrip, ...] = ()
    content: Content | None = None
    data: DataReport | None = None

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return self.result.output

    @property
    def trajectory(self) -> Trajectory:
        """The trajectory as on disk."""
        return self.result.trajectory

    @property
    def reached_target(self) -> bool:
        """True if the last step's loss is below the target, or none was asked for."""
        return self.result.reached_target

    @property
    def is_reproduced(self) -> bool:
        """True if every trained turn that was tried was reproduced exactly."""
        return all(turn.exact for turn in self.round_trips if turn.supervised)

    def describe(self) -> str:
        """The results as text; for a run that missed what was asked for, with the card that explains why."""
        last, target = self.trajectory.steps[-1], self.result.target_loss
        goal = ""
        if target is not None:
            goal = f", target {target:g} {'reached' if self.reached_target else 'NOT reached'}"
        lines = [f"loss {last['loss']:.4f} at step {last['step']}{goal}"]
        if evaluations := describe_evaluations(self.trajectory.evaluations, read_best(self.output)):
            lines.append(evaluations)
        if self.content and not (self.reached_target and self.is_reproduced):
            lines.append(explain_failure(self.content))
        elif self.round_trips:
            num_exact = sum(turn.exact for turn in self.round_trips)
            lines.append(f"round trip: {num_exact} of {len(self.round_trips)} turns came back exactly")
            lines += [f"  {turn.describe()}" for turn in self.round_trips]
        if self.data and (skipped := self.data.skipped_sentence()):
            lines.append(skipped)
        lines.append(f"report: {self.output / HTML_FILE}")
        return "\n".join([*lines, f"adapter, trajectory and config: {self.output}"])


class DataKeeper(RunObserver):
    """Keeps what became of the conversations, for the account of the run."""

    data: DataReport | None = None

    def on_prepared(self, run: PreparedRun) -> None:
        """Keep the report of the conversations."""
        self.data = run.data


def train_observed(
    config: TrainConfig,
    *,
    resume: bool = False,
    say: Callable[[str], object] = print,
    sources: Mapping[str, str] | None = None,
) -> ObservedRun:
    """Train an adapter as ``glm4ft train`` does.

    Args:
        config: The options, with ``data`` and ``output`` set.
        resume: Whether to continue the run in ``config.output`` after its last complete checkpoint.
        say: A function that is given each line of the account for people.
        sources: Options mapped to where their values came from, for the report.
    Returns:
        What came of the run.
    Raises:
        InputError: If an option, a conversation or the checkpoint cannot be used.
        RunError: If the run had to stop.
    """
    round_trip = RoundTripObserver() if config.round_trip else None
    report = RunReport(sources, round_trip)
    keeper = DataKeeper()
    observers = [keeper, FloorObserver(), RowsKeeper(), *([round_trip] if round_trip else []), report]
    result = run_training(config, observers=observers, resume=resume, say=say)
    return ObservedRun(result, round_trip.turns if round_trip else (), report.content, keeper.data)
