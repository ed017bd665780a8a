"""Attaches results to the reports of tests as plain strings, and collects them on the controller.

An attachment is JSON in ``user_properties``: it reaches the controller from an xdist worker, appears in a JUnit file as
a property, and cannot crash a worker as a tensor or a NumPy number would.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from glm4ft.files import finite

if TYPE_CHECKING:
    from glm4ft.testing.trial.runner import Result

CHECK, RUN, GPU_RAN = "glm4ft_check", "glm4ft_run", "glm4ft_gpu_ran"


def attach_check(
    node: pytest.Item, subject: str, result: Result, dtype: str = "", *, supervised: str = "", unwired: str = ""
) -> None:
    """Attach the result of a check to the report of the test that ran it.

    Args:
        node: The test that ran the check.
        subject: The subject as ``MODULE:ATTR``.
        result: The result of the check.
        dtype: The dtype of the base, if the suite runs in several; "" otherwise.
        supervised: A sentence on which tokens the subject trains, for a check that failed; "" otherwise.
        unwired: A sentence saying that the subject is not wired to its repository's code yet; "" if it is.
    """
    names = ("check", "stage", "status", "message", "cause", "seconds")
    more = {name: text for name, text in (("supervised", supervised), ("unwired", unwired)) if text}
    content = {"subject": subject, "dtype": dtype, **{name: getattr(result, name) for name in names}, **more}
    _attach(node, CHECK, content)


def attach_run(node: pytest.Item, name: str, steps: Iterable[Mapping[str, Any]]) -> None:
    """Attach the curves of a run to the report of the test that ran it.

    Args:
        node: The test.
        name: The name of the run, if the test has several; "" otherwise.
        steps: One mapping per optimizer step with ``loss`` and ``grad_norm``, numbers of any kind; mappings without a
            loss are left out.
    """
    rows = [step for step in steps if "loss" in step]
    curves = {key: [finite(row.get(key)) for row in rows] for key in ("loss", "grad_norm")}
    _attach(node, RUN, {"name": name, **curves})


def _attach(node: pytest.Item, key: str, content: dict[str, Any]) -> None:
    node.user_properties.append((key, json.dumps(content, ensure_ascii=False, allow_nan=False)))


@dataclass(eq=False)  # older versions of pytest hash their plugins
class Collected:
    """Collects the attachments of a session's reports, on the controller or in the only process.

    Args:
        checks: The results of checks, as for ``pytest_glm4ft_collected``.
        runs: The recorded runs, as for ``pytest_glm4ft_collected``.
        gpu_ran: The number of gpu tests that ran, passed or failed.
    """

    checks: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    gpu_ran: int = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect a test's attachments from its teardown report, which has all of them."""
        if report.when == "call" and not report.skipped:
            self.gpu_ran += any(key == GPU_RAN for key, _ in report.user_properties)
        if report.when != "teardown":
            return
        for key, text in report.user_properties:
            if key in (CHECK, RUN):
                kept = self.checks if key == CHECK else self.runs
                kept.append({"test": report.nodeid, **json.loads(str(text))})


def summary_lines(collected: Collected) -> list[str]:
    """The lines of the terminal summary: the verdict of each subject by stage, and the curves of each run."""
    return [*_verdict_lines(collected.checks), *(_run_line(run) for run in collected.runs)]


def _verdict_lines(checks: list[dict[str, Any]]) -> Iterable[str]:
    from glm4ft.testing.trial.verdicts import stage_verdicts

    for subject, dtype in dict.fromkeys((check["subject"], check["dtype"]) for check in checks):
        mine = [check for check in checks if (check["subject"], check["dtype"]) == (subject, dtype)]
        verdicts = stage_verdicts((check["stage"], check["status"]) for check in mine)
        told = ", ".join(f"{stage} {verdict}" for stage, verdict in verdicts.items())
        yield f"{subject}{f' in {dtype}' if dtype else ''}: {told}"
    yield from dict.fromkeys(str(check["unwired"]) for check in checks if "unwired" in check)


def _run_line(run: dict[str, Any]) -> str:
    from glm4ft.report.sparkline import sparkline

    name = run["test"].split("/")[-1] + (f" {run['name']}" if run["name"] else "")
    curves = [f"{key.replace('_', ' ')} {sparkline(run[key])}" for key in ("loss", "grad_norm") if any(run[key])]
    return f"{name} ({len(run['loss'])} steps)\n  " + "\n  ".join(curves)
