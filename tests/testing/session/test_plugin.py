"""The plugin loads fast, shows the source of each option, and why a GPU test was skipped or a GPU lane failed.

Run: pytest tests/testing/session/test_plugin.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# pytester forgets what is imported while a test runs in process, and torch crashes when it is imported a second time.
import glm4ft.model.tiny  # noqa: F401
from glm4ft.testing.plugin import why_cuda_is_missing
from glm4ft.testing.session.options import DEVICE, GPU, MODEL, OPTIONS, TOKENIZER

pytest_plugins = ["pytester"]

GPU_TEST = "import pytest\n@pytest.mark.gpu\ndef test_on_gpu(): pass\n"


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in OPTIONS:
        monkeypatch.delenv(option.variable, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like that of a tokenizer."""
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_loading_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import glm4ft.testing.plugin, sys; print({'torch', 'transformers', 'numpy', 'hypothesis'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_torch_is_imported_only_for_gpu_tests_that_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(GPU_TEST + "def test_light():\n    import sys\n    assert 'torch' not in sys.modules\n")
    pytester.runpytest_subprocess("-m", "not gpu").assert_outcomes(passed=1, deselected=1)


# --- gpu ------------------------------------------------------------------------------------------------------------


def test_a_gpu_test_is_skipped_with_what_was_needed_and_found(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    pytester.makepyfile(GPU_TEST)
    result = pytester.runpytest_inprocess("-rs", "--strict-markers")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*needs a CUDA GPU; found torch *"])


def test_a_gpu_test_runs_where_there_is_one(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    pytester.makepyfile(GPU_TEST)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "torch 9.9 without CUDA"), ("13.0", "torch 9.9 for CUDA 13.0, no device")]
)
def test_the_reason_tells_a_cpu_build_from_a_missing_device(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, reason: str
) -> None:
    fake = SimpleNamespace(
        __version__="9.9", version=SimpleNamespace(cuda=cuda), cuda=SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert why_cuda_is_missing() == reason


def test_a_missing_torch_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert why_cuda_is_missing().startswith("no torch (")


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def test_a_required_gpu_that_is_missing_stops_the_run_before_it_begins(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skipped test does not fail the session, so a lane without a GPU must fail and report what it found."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    pytester.makepyfile("def test_it(): pass\n" + GPU_TEST)
    result = pytester.runpytest_inprocess("--glm4ft-gpu=require")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*--glm4ft-gpu=require (from --glm4ft-gpu): needs a CUDA GPU; found torch *"])
    result.stdout.no_fnmatch_line("*passed*")


NOTHING_RAN = "FAILED: --glm4ft-gpu=require (from GLM4FT_GPU): no test marked gpu ran, so nothing was tested on a GPU"
SKIPS_ITSELF = "import pytest\n@pytest.mark.gpu\ndef test_on_gpu(): pytest.skip('not today')\n"


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize(
    ("code", "arguments"),
    [(SKIPS_ITSELF, []), (GPU_TEST, ["-m", "not gpu"]), ("def test_light(): pass\n", [])],
    ids=["all-skipped", "deselected", "none-there"],
)
def test_a_gpu_lane_that_ran_nothing_is_red(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, code: str, arguments: list[str]
) -> None:
    monkeypatch.setenv(GPU.variable, "require")
    pytester.makepyfile(code)
    result = pytester.runpytest_inprocess(*arguments)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([NOTHING_RAN])


@pytest.mark.usefixtures("pretended_gpu")
def test_a_gpu_lane_that_ran_is_as_green_as_its_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(GPU_TEST)
    result = pytester.runpytest_inprocess("--glm4ft-gpu=require")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*nothing was tested*")


@pytest.mark.usefixtures("pretended_gpu")
def test_a_gpu_is_left_alone_where_that_is_asked_for(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(GPU_TEST)
    result = pytester.runpytest_inprocess("-rs", "--glm4ft-gpu=never")
    result.stdout.fnmatch_lines(["SKIPPED*--glm4ft-gpu=never (from --glm4ft-gpu)"])


def test_gpu_tests_are_rehearsed_on_a_cpu_that_is_asked_for(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is visible to torch then, and so to no trainer under test."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code = "import os, pytest\n@pytest.mark.gpu\ndef test_it(): assert os.environ['CUDA_VISIBLE_DEVICES'] == ''\n"
    pytester.makepyfile(code)
    pytester.runpytest_inprocess(DEVICE.flag, "cpu").assert_outcomes(passed=1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(("visible", "shown"), [("", "1"), ("4,7", "7")])
def test_one_gpu_of_several_is_chosen_among_the_visible_ones(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, visible: str, shown: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pytester.makepyfile(f"import os\ndef test_it(): assert os.environ['CUDA_VISIBLE_DEVICES'] == {shown!r}\n")
    pytester.runpytest_inprocess(DEVICE.flag, "cuda:1").assert_outcomes(passed=1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


# --- checkpoints ----------------------------------------------------------------------------------------------------

SHOW = "def test_it(glm4ft_tokenizer): print('found', glm4ft_tokenizer)\n"


def test_the_command_line_goes_before_the_environment_and_that_before_the_ini_file(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """The header shows the source of each value."""
    monkeypatch.setenv(TOKENIZER.variable, "/nowhere")
    monkeypatch.setenv(MODEL.variable, "zai-org/model")
    pytester.makeini("[pytest]\nglm4ft_tokenizer = /nowhere\nglm4ft_model = /nowhere\nglm4ft_gpu = never\n")
    pytester.makepyfile(SHOW)
    result = pytester.runpytest_inprocess("-s", f"{TOKENIZER.flag}={folder}")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "glm4ft: model=zai-org/model (from GLM4FT_MODEL)",
            f"glm4ft: tokenizer={folder} (from --glm4ft-tokenizer)",
            "glm4ft: gpu=never (from glm4ft_gpu in tox.ini)",
            "glm4ft: subject=glm4ft.testing.subjects.own:Subject, device=auto, report=none, baseline=none (default)",
            f"*found {folder}*",
        ]
    )


def test_without_a_tokenizer_its_tests_are_skipped(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SHOW)
    result = pytester.runpytest_inprocess("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        ["*needs a real GLM-4 tokenizer; found neither --glm4ft-tokenizer nor GLM4FT_TOKENIZER"]
    )


def test_a_folder_without_a_tokenizer_is_a_usage_error(pytester: pytest.Pytester, tmp_path: Path) -> None:
    result = pytester.runpytest_inprocess(f"{TOKENIZER.flag}={tmp_path}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--glm4ft-tokenizer={tmp_path} (from --glm4ft-tokenizer): *no tokenizer.json*"])


def test_a_path_behind_a_space_that_hid_the_ini_file_is_a_usage_error(
    pytester: pytest.Pytester, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """pytest looks for the ini file next to its arguments before it knows which of them are values of options."""
    pytester.makeini("[pytest]\nglm4ft_gpu = never\n")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    result = pytester.runpytest_inprocess(MODEL.flag, str(elsewhere))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*found no ini file; write --glm4ft-model={elsewhere}*"])
    result = pytester.runpytest_inprocess(f"{MODEL.flag}={elsewhere}")
    result.stdout.fnmatch_lines(["glm4ft: gpu=never *"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--glm4ft-gpu", "always"], "*--glm4ft-gpu=always*no such mode*give one of auto, require, never*"),
        (["--glm4ft-device", "tpu"], "*--glm4ft-device=tpu*no such device*give cpu, cuda or cuda:N*"),
        (["--glm4ft-model=random:glm-4-9"], "*--glm4ft-model=random:glm-4-9 *no such geometry; give random:glm-4-9b*"),
        (["--glm4ft-subject", "my_trainer"], "*--glm4ft-subject=my_trainer*give MODULE:ATTR*"),
        (["--glm4ft-device=cpu", "--glm4ft-gpu=require"], "*--glm4ft-gpu=require*may not be used*drop one of the two*"),
    ],
)
def test_an_option_that_cannot_be_meant_is_a_usage_error(
    pytester: pytest.Pytester, arguments: list[str], says: str
) -> None:
    """The error names the option, the source of its value, the mistake and what to give instead."""
    result = pytester.runpytest_inprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([says])


def test_the_model_is_the_given_one(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(glm4ft_model): assert glm4ft_model == 'zai-org/model'\n")
    pytester.runpytest_inprocess(MODEL.flag, "zai-org/model").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("tiny", "glm4ft: gpu lane: full set of checks on tiny"),
        ("random:glm-4-9b", "glm4ft: gpu lane: reduced set of * checks on random:glm-4-9b (9.40 billion parameters)*"),
        (
            "zai-org/model",
            "glm4ft: gpu lane: reduced set of * checks on zai-org/model (size unknown*",
        ),
    ],
)
def test_the_header_of_the_gpu_lane_says_which_checks_the_base_gets(
    pytester: pytest.Pytester, model: str, says: str
) -> None:
    result = pytester.runpytest_inprocess("-m", "gpu", MODEL.flag, model)
    result.stdout.fnmatch_lines([says])


def test_the_header_is_silent_about_a_lane_that_was_left_out(pytester: pytest.Pytester) -> None:
    pytester.runpytest_inprocess("-m", "not gpu").stdout.no_fnmatch_line("*gpu lane*")


def test_the_model_is_the_built_in_base_by_default(pytester: pytest.Pytester) -> None:
    code = "import pathlib\ndef test_it(glm4ft_model): assert (pathlib.Path(glm4ft_model) / 'config.json').is_file()\n"
    pytester.makepyfile(code)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
