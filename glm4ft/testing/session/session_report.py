"""The report of a pytest session: failed tests, the verdict of each subject by stage, the curves of recorded runs."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from glm4ft.report.content import Content, Curves, Headline, ShownCheck, ShownOption
from glm4ft.report.files import write_report
from glm4ft.testing.session.options import OPTIONS
from glm4ft.testing.session.records import CHECK
from glm4ft.testing.trial.stages import STAGES
from glm4ft.testing.trial.wording import headline, shown_check

OTHER_TESTS = "other tests"
LONGEST_MESSAGE = 8000  # the number of characters shown of a failed test: its end, where the reason is


@dataclass(frozen=True)
class _Result:
    """The result of a check, from the attachment of a test."""

    check: str
    stage: str
    status: str
    message: str
    cause: str = ""


def write_session_report(
    folder: Path, config: pytest.Config, checks: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]
) -> Path:
    """Write ``report.html`` and ``summary.md`` of a session.

    Args:
        folder: The folder for both; created if it is missing.
        config: The configuration of the session.
        checks: The results of checks, as for ``pytest_glm4ft_collected``.
        runs: The recorded runs, as for ``pytest_glm4ft_collected``.
    Returns:
        The path of ``report.html``.
    """
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    stats: Mapping[str, Sequence[Any]] = reporter.stats if reporter is not None else {}
    return write_report(folder, session_content(config, stats, checks, runs))


def session_content(
    config: pytest.Config,
    stats: Mapping[str, Sequence[Any]],
    checks: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
) -> Content:
    """Gather the content of a session's report.

    Args:
        config: The configuration of the session.
        stats: The reports of pytest's terminal reporter, by outcome.
        checks: The results of checks, as for ``pytest_glm4ft_collected``.
        runs: The recorded runs, as for ``pytest_glm4ft_collected``.
    """
    failed = [report for kind in ("failed", "error") for report in stats.get(kind, ()) if not _is_check(report)]
    judged = [_Result(c["check"], c["stage"], c["status"], c["message"], c.get("cause", "")) for c in checks]
    subjects = list(dict.fromkeys(str(check["subject"]) for check in checks))
    return Content(
        title="glm4ft in pytest · " + (", ".join(subjects) or "no subject on trial"),
        headline=_headline(stats, failed, judged, _supervised(checks), _unwired(checks)),
        runs=tuple((_run_name(run), _curves(run)) for run in runs),
        checks=(*_claims(checks, judged, len(subjects)), *map(_failed_test, failed)),
        facts=tuple(_facts(stats)),
        options=tuple(ShownOption(o.flag, o.value(config) or "none", o.source(config)) for o in OPTIONS),
        command="pytest " + " ".join(map(str, config.invocation_params.args)),
    )


def _headline(
    stats: Mapping[str, Sequence[Any]],
    failed: Sequence[Any],
    judged: Sequence[_Result],
    supervised: str,
    unwired: str,
) -> Headline:
    """The verdict on the subjects, or on the other tests if only one of those failed."""
    verdict = headline(judged, supervised, unwired=unwired) if judged else None
    if not failed:
        passed = len(stats.get("passed", ()))
        return verdict or Headline("good" if passed else "unsure", f"{passed:,} tests passed, none failed.")
    text = f"{len(failed):,} {'test' if len(failed) == 1 else 'tests'} failed: {failed[0].nodeid}"
    if verdict is None or verdict.tone != "bad":
        return Headline("bad", text, happened=tuple(_reason(report) for report in failed[:3]))
    return replace(verdict, happened=(*verdict.happened, f"Apart from the claims, {text}"))


def _supervised(checks: Sequence[Mapping[str, Any]]) -> str:
    """The sentences on which tokens the subjects train, for each subject that failed a check."""
    told = {check["subject"]: check["supervised"] for check in checks if check.get("supervised")}
    return " ".join(text if len(told) == 1 else f"{subject}: {text}" for subject, text in told.items())


def _unwired(checks: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(dict.fromkeys(str(check["unwired"]) for check in checks if check.get("unwired")))


def _claims(checks: Sequence[Mapping[str, Any]], judged: Sequence[_Result], num_subjects: int) -> list[ShownCheck]:
    """The judged claims in the order of the stages; each names its subject if there are several."""
    shown = [shown_check(result) for result in judged]
    if num_subjects > 1:
        pairs = zip(shown, checks, strict=True)
        shown = [replace(claim, claim=f"{claim.claim} ({check['subject']})") for claim, check in pairs]
    return sorted(shown, key=lambda claim: STAGES.index(claim.stage))


def _failed_test(report: Any) -> ShownCheck:
    return ShownCheck(OTHER_TESTS, report.nodeid, "failed", report.longreprtext[-LONGEST_MESSAGE:])


def _reason(report: Any) -> str:
    """The first line of a failure's exception text, which pytest marks with ``E``; the node id if there is none."""
    lines = [line.removeprefix("E").strip() for line in report.longreprtext.split("\n") if line.startswith("E ")]
    return next((line for line in lines if line), str(report.nodeid))


def _is_check(report: Any) -> bool:
    return any(key == CHECK for key, _ in report.user_properties)


def _run_name(run: Mapping[str, Any]) -> str:
    return f"{run['test']} {run['name']}".strip()


def _curves(run: Mapping[str, Any]) -> Curves:
    figures = [{"loss": loss, "grad_norm": norm} for loss, norm in zip(run["loss"], run["grad_norm"], strict=True)]
    return Curves.of(figures)


def _facts(stats: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, str]]:
    kinds = [kind for kind in ("passed", "failed", "error", "skipped", "xfailed", "xpassed") if stats.get(kind)]
    yield "tests", ", ".join(f"{len(stats[kind]):,} {kind}" for kind in kinds) or "none"
    yield "versions", f"pytest {pytest.__version__}"
    yield "system", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
