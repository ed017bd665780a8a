"""The plugin loads fast, finds checkpoints by option or environment, and says why a GPU test was skipped.

Run: pytest tests/testing/test_plugin.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# pytester forgets what is imported while a test runs in process, and torch crashes when it is imported a second time.
import glm4ft.tiny  # noqa: F401
from glm4ft.testing.plugin import MODEL, TOKENIZER, what_stands_in_for_cuda

pytest_plugins = ["pytester"]

GPU_TEST = "import pytest\n@pytest.mark.gpu\ndef test_on_gpu(): pass\n"


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODEL.variable, raising=False)
    monkeypatch.delenv(TOKENIZER.variable, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What looks like a tokenizer's folder."""
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
    assert what_stands_in_for_cuda() == reason


def test_a_missing_torch_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert what_stands_in_for_cuda().startswith("no torch (")


# --- checkpoints ----------------------------------------------------------------------------------------------------

SHOW = "def test_it(glm4ft_tokenizer): print('found', glm4ft_tokenizer)\n"


def test_the_command_line_goes_before_the_environment(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """And the header says where each value came from."""
    monkeypatch.setenv(TOKENIZER.variable, "/nowhere")
    monkeypatch.setenv(MODEL.variable, "zai-org/model")
    pytester.makepyfile(SHOW)
    result = pytester.runpytest_inprocess("-s", TOKENIZER.flag, str(folder))
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["glm4ft: GLM4FT_MODEL=zai-org/model", f"glm4ft: --glm4ft-tokenizer={folder}", f"*found {folder}*"]
    )


def test_xdist_workers_find_the_tokenizer_as_well(pytester: pytest.Pytester, folder: Path) -> None:
    pytester.makepyfile(f"def test_it(glm4ft_tokenizer): assert glm4ft_tokenizer == {str(folder)!r}\n")
    pytester.runpytest_subprocess("-n2", TOKENIZER.flag, str(folder)).assert_outcomes(passed=1)


def test_without_a_tokenizer_its_tests_are_skipped(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SHOW)
    result = pytester.runpytest_inprocess("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        ["*needs a real GLM-4 tokenizer; found neither --glm4ft-tokenizer nor GLM4FT_TOKENIZER"]
    )


def test_a_folder_without_a_tokenizer_is_a_usage_error(pytester: pytest.Pytester, tmp_path: Path) -> None:
    result = pytester.runpytest_inprocess(TOKENIZER.flag, str(tmp_path))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--glm4ft-tokenizer={tmp_path}: there is no tokenizer.json*"])


def test_the_model_is_the_given_one(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(glm4ft_model): assert glm4ft_model == 'zai-org/model'\n")
    pytester.runpytest_inprocess(MODEL.flag, "zai-org/model").assert_outcomes(passed=1)


def test_the_model_is_the_built_in_base_by_default(pytester: pytest.Pytester) -> None:
    code = "import pathlib\ndef test_it(glm4ft_model): assert (pathlib.Path(glm4ft_model) / 'config.json').is_file()\n"
    pytester.makepyfile(code)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
