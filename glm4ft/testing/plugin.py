"""The pytest plugin: options for base, subject and GPU, the fixtures of the conformance suite, and a summary.

pytest loads this module in every environment that has glm4ft installed, so it imports nothing heavy: torch only after
a test marked ``gpu`` has been collected, most of glm4ft only inside fixtures and for the summary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from glm4ft.testing.session import hooks, options
from glm4ft.testing.session.options import BASELINE, DEVICE, GPU, MODEL, REPORT, SUBJECT, TOKENIZER
from glm4ft.testing.session.records import GPU_RAN, Collected, attach_run, summary_lines

if TYPE_CHECKING:
    from glm4ft.testing.conformance import BoundCheck, Trials
    from glm4ft.testing.session.gpu_lane import Bases

MARKERS = (
    "gpu: needs a CUDA GPU and is skipped without one; selected by -m gpu",
    "overfit: trains until a few conversations are memorised",
    "slow: takes longer than ten seconds",
)
COLLECTED = pytest.StashKey[Collected]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options."""
    for option in options.OPTIONS:
        option.register(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the hook that receives everything that tests attached."""
    pluginmanager.add_hookspecs(hooks)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, refuse invalid options, and choose the device before torch looks for one."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    options.require_legal(config)
    _choose_device(config)
    if not _is_worker(config):
        config.stash[COLLECTED] = Collected()
        config.pluginmanager.register(config.stash[COLLECTED], "glm4ft-collected")


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")  # of pytest-xdist


def _choose_device(config: pytest.Config) -> None:
    """Make only the requested device visible to torch, and so to every trainer under test."""
    kind, _, number = DEVICE.value(config).partition(":")
    if kind != "cpu" and not number:
        return
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    if kind == "cpu":
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
    elif int(number) < len(visible):
        patch.setenv("CUDA_VISIBLE_DEVICES", visible[int(number)])
    else:
        patch.setenv("CUDA_VISIBLE_DEVICES", number)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Show each option with its source and, if gpu tests are selected, which checks the base gets."""
    lines = options.describe(config)
    expression = str(config.getoption("markexpr"))
    if "gpu" in expression and "not gpu" not in expression:
        from glm4ft.testing.session.gpu_lane import describe_lane

        lines.append(f"glm4ft: gpu lane: {describe_lane(MODEL.value(config))}")
    return lines


# --- gpu ---


@pytest.hookimpl(tryfirst=True)  # before xdist starts its workers
def pytest_sessionstart(session: pytest.Session) -> None:
    """Stop the session before it begins if a GPU is required but missing."""
    config = session.config
    if GPU.value(config) != "require" or _is_worker(config) or config.getoption("collectonly"):
        return
    found = why_cuda_is_missing()
    if found:
        reason = f"{GPU.flag}=require (from {GPU.source(config)}): needs a CUDA GPU; found {found}"
        pytest.exit(reason, returncode=pytest.ExitCode.TESTS_FAILED)


@pytest.hookimpl(trylast=True)  # after -m and -k have deselected: without a gpu test, torch is not imported
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where they cannot run."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu_test(config) if gpu_items else ""
    for item in gpu_items:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu_test(config: pytest.Config) -> str:
    if GPU.value(config) == "never":
        return f"{GPU.flag}=never (from {GPU.source(config)})"
    if DEVICE.value(config) == "cpu":  # the user asked to run the gpu tests on a CPU
        return ""
    found = why_cuda_is_missing()
    return f"needs a CUDA GPU; found {found}" if found else ""


def why_cuda_is_missing() -> str:
    """The reason why tests cannot run on CUDA; "" if they can."""
    try:
        import torch
    except ImportError as error:
        return f"no torch ({error})"
    if torch.cuda.is_available():
        return ""
    return f"torch {torch.__version__} " + (
        f"for CUDA {torch.version.cuda}, no device" if torch.version.cuda else "without CUDA"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Attach to the report that a gpu test ran; the report itself shows whether it skipped itself."""
    if item.get_closest_marker("gpu"):
        item.user_properties.append((GPU_RAN, DEVICE.value(item.config)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if a GPU was required but no gpu test ran; pass the attachments to the hook and the report."""
    config = session.config
    collected = config.stash.get(COLLECTED, None)
    if collected is None or config.getoption("collectonly"):
        return
    if _lane_ran_nothing(config, collected) and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    config.hook.pytest_glm4ft_collected(config=config, checks=collected.checks, runs=collected.runs)
    if REPORT.value(config):
        from glm4ft.testing.session.session_report import write_session_report

        write_session_report(Path(REPORT.value(config)), config, collected.checks, collected.runs)


def _lane_ran_nothing(config: pytest.Config, collected: Collected) -> bool:
    return GPU.value(config) == "require" and not collected.gpu_ran


# --- what tests attached ---


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add a section with claim, stage and motive to the report of a failed check."""
    report = yield
    bound: BoundCheck | None = getattr(item, "callspec", None) and item.callspec.params.get("glm4ft_check")  # type: ignore[attr-defined]
    if bound is not None and report.when == "call" and report.failed:
        report.sections.append((f"glm4ft: {bound.check.stage}, {bound.check.name}", bound.explain()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the verdict of each subject by stage, the curves of runs, and whether a required gpu test is missing."""
    collected = config.stash.get(COLLECTED, None)
    if collected is None:
        return
    lines = summary_lines(collected)
    if REPORT.value(config) and not config.getoption("collectonly"):
        lines.append(f"report: {Path(REPORT.value(config)) / 'report.html'}")
    if _lane_ran_nothing(config, collected) and not config.getoption("collectonly"):
        reason = "no test marked gpu ran, so nothing was tested on a GPU"
        lines.append(f"FAILED: {GPU.flag}=require (from {GPU.source(config)}): {reason}")
    if lines:
        terminalreporter.section("glm4ft")
        terminalreporter.write_line("\n".join(lines))


# --- fixtures ---


@pytest.fixture(scope="session")
def glm4ft_bases(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bases]:
    """The base given by ``--glm4ft-model`` in each dtype; bases that were written are deleted after the session."""
    from glm4ft.testing.session.gpu_lane import Bases

    folder = tmp_path_factory.mktemp("glm4ft-bases")
    yield Bases(MODEL.value(pytestconfig), folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def glm4ft_model(glm4ft_bases: Bases) -> str:
    """The base given by ``--glm4ft-model``, by default the built-in one: the path of an existing folder or a hub id."""
    return glm4ft_bases.get()


@pytest.fixture(scope="session")
def glm4ft_tokenizer(pytestconfig: pytest.Config) -> str:
    """The folder given by ``--glm4ft-tokenizer``; without the option, a test that uses this fixture is skipped."""
    given = TOKENIZER.value(pytestconfig)
    if not given:
        pytest.skip(f"needs a real GLM-4 tokenizer; found neither {TOKENIZER.flag} nor {TOKENIZER.variable}")
    return given


@pytest.fixture
def glm4ft_record_run(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function ``glm4ft_record_run(steps, name="")`` that attaches a run's curves to the report of the test.

    ``steps`` has one mapping per optimizer step with ``loss`` and ``grad_norm``. The curves are drawn at the end of the
    session and passed to the hook ``pytest_glm4ft_collected``.
    """

    def record(steps: Iterable[Mapping[str, Any]], name: str = "") -> None:
        attach_run(request.node, name, steps)

    return record


@pytest.fixture(scope="session")
def glm4ft_trials(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, glm4ft_bases: Bases) -> Trials:
    """The trials of the session, one per subject and dtype; the checks of ``parametrize_with_checks`` use them."""
    from glm4ft.testing.conformance import Trials

    folder = tmp_path_factory.mktemp("glm4ft-checks")
    return Trials(glm4ft_bases, folder, default_subject=SUBJECT.value(pytestconfig))


@pytest.fixture
def glm4ft_check(request: pytest.FixtureRequest, glm4ft_trials: Trials) -> Callable[[], None]:
    """A function that runs one check of the conformance suite; ``parametrize_with_checks`` chooses the check."""
    bound: BoundCheck = request.param
    return lambda: bound.run(request.node, glm4ft_trials)


@pytest.fixture
def glm4ft_baseline(pytestconfig: pytest.Config) -> Callable[..., None]:
    """A function ``glm4ft_baseline(name)`` that fails if training no longer gives the curves of ``DIR/name.jsonl``.

    ``--glm4ft-baseline=DIR`` names the folder; without it the test is skipped. The file states subject, base, plan and
    seeds; ``glm4ft baseline record`` writes it, a test never does. For a file of recorded runs, the folders of today's
    recordings are passed as ``recordings``.
    """
    folder = BASELINE.value(pytestconfig)
    if not folder:
        pytest.skip(f"needs recorded curves; found neither {BASELINE.flag} nor {BASELINE.variable}")

    def require(name: str, recordings: Sequence[str | Path] = ()) -> None:
        from glm4ft.testing.baseline.compare import compare_again

        comparison = compare_again(Path(folder) / f"{name}.jsonl", recordings=[Path(path) for path in recordings])
        if comparison.is_alarm:
            pytest.fail(f"{name}: {comparison}", pytrace=False)

    return require
