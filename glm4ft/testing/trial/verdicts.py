"""Summarises the results of checks: a verdict per stage, and the failures of one cause together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from glm4ft.report.content import STATUSES
from glm4ft.testing.trial.stages import STAGES

_WORDS = {
    "error": "failed",
    "failed": "failed",
    "expected-failure": "expected failure",
    "passed": "passed",
    "skipped": "not judged",
}


def stage_verdicts(results: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The verdict of each stage that has a check, in the order of the stages.

    Args:
        results: The stage and the status of each check.
    Returns:
        ``failed``, ``expected failure``, ``passed``, or ``not judged`` if all checks were skipped, by stage.
    """
    found: dict[str, set[str]] = {}
    for stage, status in results:
        found.setdefault(stage, set()).add(status)
    return {
        stage: next(_WORDS[status] for status in STATUSES if status in found[stage])
        for stage in STAGES
        if stage in found
    }


class Judged(Protocol):
    """The result of a check, as ``glm4ft.testing.trial.runner`` returns it."""

    @property
    def check(self) -> str: ...  # noqa: D102
    @property
    def stage(self) -> str: ...  # noqa: D102
    @property
    def status(self) -> str: ...  # noqa: D102
    @property
    def message(self) -> str: ...  # noqa: D102
    @property
    def cause(self) -> str: ...  # noqa: D102


@dataclass
class FailureGroup:
    """Checks that fail for one cause, as far as their results show.

    Args:
        stage: The first stage at which the cause shows.
        text: The cause; where no check found one, the first failure.
        checks: The names of the checks that see it.
    """

    stage: str
    text: str
    checks: list[str]


def group_failures(results: Iterable[Judged]) -> list[FailureGroup]:
    """Put failures together: those with equal causes, equal errors, and those that another failure explains.

    A failure without a cause of its own belongs to the first failure of its stage; one of the outcome to the first
    failure of all, since a step that is wrong gives a wrong result.

    Args:
        results: The results of the checks.
    Returns:
        The groups, in the order of the stages.
    """
    wrong = sorted((r for r in results if r.status in ("failed", "error")), key=lambda r: STAGES.index(r.stage))
    groups: dict[str, FailureGroup] = {}
    for result in wrong:
        own = result.cause or (result.message if result.status == "error" else "")
        own = "".join(c for c in own if not c.isdigit())  # one mistake has another factor at each size of a step
        found = groups.get(own) if own else _explaining(result, list(groups.values()))
        if found is None:
            text = result.cause or result.message.strip().split("\n")[0]
            groups[own or text] = FailureGroup(result.stage, text, [result.check])
        else:
            found.checks.append(result.check)
    return list(groups.values())


def _explaining(result: Judged, groups: list[FailureGroup]) -> FailureGroup | None:
    same = [group for group in groups if group.stage == result.stage]
    return next(iter(groups if result.stage == "outcome" else same), None)
