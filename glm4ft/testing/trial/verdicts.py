"""From the results of single checks to one word per stage."""

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
    """One word per stage, in the order of the stages.

    Args:
        results: stage and status of each check.
    Returns:
        Stage to ``failed``, ``expected failure``, ``passed``, or ``not judged`` if all its checks were skipped.
    """
    found: dict[str, set[str]] = {}
    for stage, status in results:
        found.setdefault(stage, set()).add(status)
    return {
        stage: next(_WORDS[status] for status in STATUSES if status in found[stage])
        for stage in STAGES
        if stage in found
    }
