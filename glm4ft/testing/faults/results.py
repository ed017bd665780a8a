"""Results of faults and variations: the data of the kill matrix."""

from __future__ import annotations

from dataclasses import dataclass

from glm4ft.testing.faults.practices import PRACTICES, Noticed
from glm4ft.testing.replay.tolerances import Observation


@dataclass(frozen=True)
class Caught:
    """The result of one fault, whether it was caught or not.

    Args:
        id: The id of the fault.
        expected_stage: The stage that the verdict must name.
        caught_by: The first check that failed; empty if none did.
        diagnosed_stage: The stage of that check; "" if none failed.
        message: The message of that check.
        names_cause: Whether the message names the cause.
        seconds: The time until the verdict.
        errors: The checks in which the pipeline raised an exception, which is no verdict.
        over: The numbers that were over their limits.
    """

    id: str
    expected_stage: str
    caught_by: tuple[str, ...]
    diagnosed_stage: str
    message: str
    names_cause: bool
    seconds: float
    errors: tuple[str, ...] = ()
    over: tuple[Observation, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether the verdict names the expected stage."""
        return self.diagnosed_stage == self.expected_stage


@dataclass(frozen=True)
class Silence:
    """The result of one benign variation.

    Args:
        id: The id of the variation.
        alarms: The checks that failed or raised another exception, each with its message.
        seconds: The time that all its checks took.
    """

    id: str
    alarms: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Matrix:
    """All results of one command.

    Args:
        faults: The results of the faults, in the order of the stages.
        benign: The results of the benign variations, in the order of their module.
        noticed: The practices that notice each fault, by its id; empty if they were not tried. They are tried on the
            faults of the dense base alone.
        seconds: The time that the command took.
    """

    faults: tuple[Caught, ...]
    benign: tuple[Silence, ...]
    noticed: dict[str, Noticed]
    seconds: float

    @property
    def failures(self) -> list[str]:
        """The ids of faults that were not caught at their stage, and of variations with an alarm."""
        wrong = [caught.id for caught in self.faults if not caught.is_right]
        return wrong + [silence.id for silence in self.benign if silence.alarms]

    def score(self) -> list[str]:
        """The score as lines of text, one for each figure."""
        count = len(self.faults)
        figures = {
            "caught": sum(bool(caught.caught_by) for caught in self.faults),
            "stage right": sum(caught.is_right for caught in self.faults),
            "cause named": sum(caught.names_cause for caught in self.faults),
        }
        lines = [f"{name}: {n} of {count} ({n / count:.0%})" for name, n in figures.items() if count]
        if self.benign:
            alarms = sum(bool(silence.alarms) for silence in self.benign)
            lines.append(f"alarms on benign variations: {alarms} of {len(self.benign)}")
        if self.noticed and count:
            for i, practice in enumerate(PRACTICES):
                n, tried = sum(noticed.by[i] for noticed in self.noticed.values()), len(self.noticed)
                lines.append(f"noticed by {practice}: {n} of {tried} ({n / tried:.0%})")
        return lines
