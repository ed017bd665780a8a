"""Attachments of tests reach the controller as plain strings, are drawn there, and are passed to the hook.

Run: pytest tests/testing/session/test_plugin_records.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

# pytester forgets what is imported while a test runs in process, and torch crashes when it is imported a second time.
import glm4ft.model.tiny  # noqa: F401
from glm4ft.testing.session.options import OPTIONS
from glm4ft.testing.trial.verdicts import stage_verdicts

pytest_plugins = ["pytester"]

RECORDS = """
def test_run(glm4ft_record_run):
    steps = [{"loss": 8.0, "grad_norm": 2.0}, {"loss": 0.08, "grad_norm": float("nan")}, {"eval_loss": 1.0}]
    glm4ft_record_run(steps, name="padded")
"""
DUMP = """
import json
def pytest_glm4ft_collected(config, checks, runs):
    path = config.rootpath / "collected.json"
    assert not path.exists(), "called twice"
    path.write_text(json.dumps({"checks": checks, "runs": runs}))
"""
RUN = {"name": "padded", "loss": [8.0, 0.08], "grad_norm": [2.0, None]}


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in OPTIONS:
        monkeypatch.delenv(option.variable, raising=False)


def test_the_curves_of_a_run_are_drawn_at_the_end(pytester: pytest.Pytester) -> None:
    """The scale is logarithmic, a value that is not finite is a cross, and entries without a loss are left out."""
    pytester.makepyfile(RECORDS)
    result = pytester.runpytest_inprocess()
    result.stdout.fnmatch_lines(
        ["* glm4ft *", "*::test_run padded (2 steps)", "  loss 8 █▁ 0.08", "  grad norm 2 ▁× ×"]
    )


def test_a_session_without_runs_has_no_summary(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(): pass")
    pytester.runpytest_inprocess().stdout.no_fnmatch_line("*= glm4ft =*")


def test_the_hook_is_given_what_was_collected(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(DUMP)
    path = pytester.makepyfile(RECORDS)
    pytester.runpytest_inprocess()
    collected = json.loads((pytester.path / "collected.json").read_text())
    assert collected == {"checks": [], "runs": [{"test": f"{path.name}::test_run", **RUN}]}


def test_numbers_of_libraries_do_not_bring_down_anything(pytester: pytest.Pytester) -> None:
    """Tensors and NumPy numbers become floats when they are attached."""
    code = "import numpy, torch\ndef test_it(glm4ft_record_run): glm4ft_record_run([{'loss': %s, 'grad_norm': %s}])"
    pytester.makepyfile(code % ("numpy.float32(0.5)", "torch.tensor(2.0)"))
    result = pytester.runpytest_inprocess("--junit-xml=junit.xml")
    result.stdout.fnmatch_lines(["  loss 0.5 ▁ 0.5", "  grad norm 2 ▁ 2"])
    assert "glm4ft_run" in (pytester.path / "junit.xml").read_text()


CHECKED = """
import pytest
from types import SimpleNamespace
from glm4ft.testing.session.records import attach_check

@pytest.mark.gpu
def test_on_gpu(request):
    result = SimpleNamespace(check="x", stage="rows", status="failed", message="<|user|>", cause="", seconds=0.5)
    attach_check(request.node, "my:subject", result)
"""
# a stand-in for torch, which would take each process seconds to import
PRETENDED_TORCH = "from types import SimpleNamespace\ncuda = SimpleNamespace(is_available=lambda: True)\n"


def test_workers_attach_and_the_controller_reports(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everything that is passed between processes: options, curves, results of checks, the gpu tests that ran."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (pytester.mkdir("pretended") / "torch.py").write_text(PRETENDED_TORCH)
    monkeypatch.setenv("PYTHONPATH", str(pytester.path / "pretended"), prepend=":")
    pytester.makeconftest(DUMP)
    tokenizer = f"def test_it(glm4ft_tokenizer): assert glm4ft_tokenizer == {str(tmp_path)!r}\n"
    pytester.makepyfile(test_run=RECORDS, test_tokenizer=tokenizer, test_checked=CHECKED)
    options = ["--glm4ft-gpu=require", f"--glm4ft-tokenizer={tmp_path}"]
    result = pytester.runpytest_subprocess("-n2", *options)
    result.assert_outcomes(passed=3)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["* glm4ft *", "my:subject: rows failed", "*::test_run padded (2 steps)"])
    collected = json.loads((pytester.path / "collected.json").read_text())
    assert collected["runs"] == [{"test": "test_run.py::test_run", **RUN}]
    facts = {"check": "x", "stage": "rows", "status": "failed", "message": "<|user|>", "cause": "", "seconds": 0.5}
    assert collected["checks"] == [
        {"test": "test_checked.py::test_on_gpu", "subject": "my:subject", "dtype": "", **facts}
    ]


def test_the_verdict_of_a_stage_is_the_gravest_of_its_checks() -> None:
    found = [
        ("outcome", "skipped"),
        ("rows", "passed"),
        ("rows", "error"),
        ("model", "passed"),
        ("model", "skipped"),
        ("update", "expected-failure"),
        ("update", "passed"),
    ]
    verdicts = {"rows": "failed", "model": "passed", "update": "expected failure", "outcome": "not judged"}
    assert list(stage_verdicts(found).items()) == list(verdicts.items())


FAILING = """
from types import SimpleNamespace
from glm4ft.testing.session.records import attach_check

def test_claim(request):
    facts = {"check": "every_x_is_y", "stage": "rows", "status": "failed", "message": "<b>position 7"}
    result = SimpleNamespace(**facts, cause="", seconds=0.5)
    attach_check(request.node, "my:subject", result, supervised="all 4 headers.")
    assert False

def test_other(glm4ft_record_run):
    glm4ft_record_run([{"loss": 8.0, "grad_norm": 2.0}, {"loss": 0.08, "grad_norm": 1.0}])
    raise ValueError("::error::\\x1b[31m<script>")
"""


def test_a_report_of_the_session_is_written_where_it_is_asked_for(pytester: pytest.Pytester) -> None:
    """The report has verdict, claims, other failures, curves and options; markup in them is shown, not executed."""
    pytester.makepyfile(FAILING)
    result = pytester.runpytest_inprocess("--glm4ft-report=out")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["report: out/report.html"])
    page = (pytester.path / "out" / "report.html").read_text("utf-8")
    for text in ("1 of 1 claims fail, first at stage rows.", "all 4 headers.", "every x is y", "&lt;b&gt;position 7",
                 "ValueError: ::error::\\x1b[31m&lt;script&gt;", "step 2: loss", "2 failed"):  # fmt: skip
        assert text in page
    summary = (pytester.path / "out" / "summary.md").read_text("utf-8")
    assert summary.startswith("### ❌ At stage rows: &#60;b&#62;position 7.")
    assert "- 1 of 1 claims fail, first at stage rows." in summary
    assert "\x1b" not in page + summary
    assert "<script" not in page + summary


def test_a_report_under_xdist_holds_what_all_workers_found(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FAILING)
    pytester.runpytest_subprocess("-n2", "--glm4ft-report=out", "-p", "no:cacheprovider").assert_outcomes(failed=2)
    page = (pytester.path / "out" / "report.html").read_text("utf-8")
    assert "every x is y" in page
    assert "ValueError" in page


def test_a_report_of_a_session_without_our_checks_needs_no_torch(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it():\n    import sys\n    assert 'torch' not in sys.modules\n")
    pytester.makeconftest(
        "import pytest, sys\n"
        "@pytest.hookimpl(wrapper=True, tryfirst=True)\n"
        "def pytest_sessionfinish():\n    yield\n    assert 'torch' not in sys.modules\n"
    )
    pytester.runpytest_subprocess("--glm4ft-report=out").assert_outcomes(passed=1)
    assert "1 tests passed, none failed." in (pytester.path / "out" / "report.html").read_text("utf-8")
