"""Summarises the results of checks as one verdict per stage."""

from __future__ import annotations

from collections.abc import Iterable

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
