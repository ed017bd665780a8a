"""The pytest plugin: where a real checkpoint is, and which tests need a GPU.

pytest loads this module in every environment that has glm4ft installed, so it imports nothing heavy: torch only once
a test marked ``gpu`` has been collected, glm4ft's own modules only inside fixtures.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class _Checkpoint:
    """An option whose value is given on the command line or, failing that, in the environment."""

    flag: str
    variable: str
    help: str

    def value(self, config: pytest.Config) -> str:
        """The option's value, or "" if it is not given."""
        return str(config.getoption(self.flag) or os.environ.get(self.variable, ""))

    def source(self, config: pytest.Config) -> str:
        """Where the value came from."""
        return self.flag if config.getoption(self.flag) else self.variable


MODEL = _Checkpoint("--glm4ft-model", "GLM4FT_MODEL", "GLM-4 checkpoint for tests that need a model: folder or hub id")
TOKENIZER = _Checkpoint("--glm4ft-tokenizer", "GLM4FT_TOKENIZER", "folder of a real GLM-4 tokenizer: one more lane")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options."""
    group = parser.getgroup("glm4ft", "GLM-4 fine-tuning")
    for option in (MODEL, TOKENIZER):
        group.addoption(option.flag, metavar="PATH", help=f"{option.help} (environment: {option.variable})")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and refuse a tokenizer folder that cannot be one."""
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU, is skipped without one")
    config.addinivalue_line("markers", "slow: takes longer than ten seconds")
    folder = TOKENIZER.value(config)
    if folder and not (Path(folder) / "tokenizer.json").is_file():
        raise pytest.UsageError(
            f"{TOKENIZER.source(config)}={folder}: there is no tokenizer.json, so no test could load the tokenizer; "
            "give the folder that holds it"
        )


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name each option that is given, with its source."""
    given = [option for option in (MODEL, TOKENIZER) if option.value(config)]
    return [f"glm4ft: {option.source(config)}={option.value(config)}" for option in given]


@pytest.hookimpl(trylast=True)  # after -m and -k have deselected: who runs no gpu test does not wait for torch
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where they cannot run."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    found = what_stands_in_for_cuda() if gpu_items else ""
    for item in gpu_items:
        if found:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA GPU; found {found}"))


def what_stands_in_for_cuda() -> str:
    """Why tests cannot run on CUDA, or "" if they can."""
    try:
        import torch
    except ImportError as error:
        return f"no torch ({error})"
    if torch.cuda.is_available():
        return ""
    return f"torch {torch.__version__} " + (
        f"for CUDA {torch.version.cuda}, no device" if torch.version.cuda else "without CUDA"
    )


@pytest.fixture(scope="session")
def glm4ft_model(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint given by ``--glm4ft-model``, else a folder with the built-in tiny base."""
    given = MODEL.value(pytestconfig)
    if given:
        return given
    from glm4ft.tiny import write_tiny_base

    return str(write_tiny_base(tmp_path_factory.mktemp("glm4ft") / "tiny-base"))


@pytest.fixture(scope="session")
def glm4ft_tokenizer(pytestconfig: pytest.Config) -> str:
    """The folder given by ``--glm4ft-tokenizer``; a test that needs one is skipped without it."""
    given = TOKENIZER.value(pytestconfig)
    if not given:
        pytest.skip(f"needs a real GLM-4 tokenizer; found neither {TOKENIZER.flag} nor {TOKENIZER.variable}")
    return given
