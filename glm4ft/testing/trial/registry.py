"""Registers checks: functions ``check_<claim>(trial)`` that raise ``CheckFailed``, with their stage and motive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from glm4ft.testing.trial.stages import STAGES
from glm4ft.testing.trial.trial import Trial

CHECKS: list[Check] = []


@dataclass(frozen=True)
class Check:
    """A claim about a fine-tuning pipeline, with the function that tests it.

    Args:
        run: The function of the check; its name without ``check_`` is the check's name.
        stage: The slug of the stage that the check judges.
        needs: The members of the subject that the check uses.
        incident: The real case that motivates the check.
    """

    run: Callable[[Trial], None]
    stage: str
    needs: frozenset[str]
    incident: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The name that reports show."""
        return self.run.__name__.removeprefix("check_")


def check(
    *, stage: str, needs: tuple[str, ...] = (), incident: str
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register the decorated function as a check.

    Args:
        stage: The slug of the stage that the check judges.
        needs: The optional members of the subject without which the check is skipped.
        incident: The repository and number of the case that motivates the check, in half a sentence.
    Returns:
        A decorator that returns the function unchanged.
    Raises:
        ValueError: If there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"{stage} is not a stage; the stages are {', '.join(STAGES)}")

    def register(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        CHECKS.append(Check(function, stage, frozenset(needs), incident))
        return function

    return register
