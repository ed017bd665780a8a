"""What a check is: a function ``check_<claim>(trial)`` that raises ``CheckFailed``, and what the runner knows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from glm4ft.testing.trial.stages import STAGES
from glm4ft.testing.trial.trial import Trial

CHECKS: list[Check] = []


@dataclass(frozen=True)
class Check:
    """A claim about a fine-tuning pipeline.

    Args:
        run: the function; its name without ``check_`` is the check's.
        stage: slug of the stage it judges.
        needs: members of the subject it uses.
        incident: the real case that motivates it.
    """

    run: Callable[[Trial], None]
    stage: str
    needs: frozenset[str]
    incident: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """As reports show it."""
        return self.run.__name__.removeprefix("check_")


def check(
    *, stage: str, needs: tuple[str, ...] = (), incident: str
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a check.

    Args:
        stage: slug of the stage it judges.
        needs: optional members of the subject, without which it is skipped.
        incident: repository and number of the case that motivates it, in half a sentence.
    """
    if stage not in STAGES:
        raise ValueError(f"{stage} is no stage; the stages are {', '.join(STAGES)}")

    def register(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        CHECKS.append(Check(function, stage, frozenset(needs), incident))
        return function

    return register
