"""The greedy round trip after training: every assistant turn of the rows, said by the model that was trained."""

from __future__ import annotations

from pathlib import Path

from glm4ft.model.generation import TurnRoundTrip, round_trip
from glm4ft.train.observer import PreparedRun, RunObserver


class RoundTripObserver(RunObserver):
    """Has the trained model generate every assistant turn of its rows.

    Args:
        turns: One result per assistant turn; empty before the run has ended.
    """

    def __init__(self) -> None:
        self.turns: tuple[TurnRoundTrip, ...] = ()

    def is_done(self, output: Path) -> bool:
        """False: of an earlier round trip it is not known whether it was finished, or what came of it."""
        return False

    def on_end(self, run: PreparedRun) -> None:
        """Generate the turns."""
        rows = (run.rows.encoded(index) for index in range(len(run.rows)))
        self.turns = tuple(round_trip(run.model, run.chat_format, rows))
