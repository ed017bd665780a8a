"""The plugin's options, and the source of each value: command line, environment, ini file or default."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from glm4ft.errors import ConfigError
from glm4ft.testing.bases.geometry import RANDOM_PREFIX, geometry

GPU_MODES = ("auto", "require", "never")
OWN_SUBJECT = "glm4ft.testing.subjects.own:Subject"


@dataclass(frozen=True)
class Option:
    """An option that is looked up on the command line, then in the environment, then in the ini file.

    Args:
        name: The name of the option without the prefix ``glm4ft``.
        metavar: The placeholder of the value in the help text.
        default: The value if none is given; "" for no value.
        help: The help text for ``pytest --help``.
    """

    name: str
    metavar: str
    default: str
    help: str

    @property
    def flag(self) -> str:
        """The name of the option on the command line."""
        return f"--glm4ft-{self.name}"

    @property
    def variable(self) -> str:
        """The name of the option's environment variable."""
        return f"GLM4FT_{self.name.upper()}"

    @property
    def ini(self) -> str:
        """The name of the option's key in the ini file."""
        return f"glm4ft_{self.name}"

    def register(self, parser: pytest.Parser) -> None:
        """Register the option with pytest."""
        group = parser.getgroup("glm4ft", "GLM-4 fine-tuning")
        text = f"{self.help} (environment: {self.variable}, ini: {self.ini}, default: {self.default or 'none'})"
        group.addoption(self.flag, metavar=self.metavar, help=text)
        parser.addini(self.ini, self.help, default="")

    def value(self, config: pytest.Config) -> str:
        """The option's value; the default if it is given nowhere."""
        return self._found(config)[0]

    def source(self, config: pytest.Config) -> str:
        """The source of the value: the flag, the environment variable, the ini key, or ``default``."""
        return self._found(config)[1]

    def _found(self, config: pytest.Config) -> tuple[str, str]:
        sources = (
            (config.getoption(self.flag), self.flag),
            (os.environ.get(self.variable), self.variable),
            (config.getini(self.ini), f"{self.ini} in {config.inipath.name if config.inipath else 'ini'}"),
        )
        return next(((str(value), source) for value, source in sources if value), (self.default, "default"))


MODEL = Option(
    "model", "BASE", "tiny",
    "base model for the tests that need one: a folder, a hub id, tiny, tiny:glm-4.5, or random:glm-4-9b",
)  # fmt: skip
TOKENIZER = Option(
    "tokenizer", "PATH", "", "folder of a real GLM-4 tokenizer, on which the format tests then run as well"
)
SUBJECT = Option("subject", "MODULE:ATTR", OWN_SUBJECT, "pipeline for a parametrize_with_checks() that names none")
DEVICE = Option("device", "DEVICE", "auto", "cpu, cuda or cuda:N; tests marked gpu run on a CPU only with cpu")
GPU = Option(
    "gpu",
    "|".join(GPU_MODES),
    "auto",
    "tests marked gpu: auto skips them without a GPU, require fails without a GPU or if none ran, never skips them",
)
REPORT = Option("report", "DIR", "", "folder into which report.html and summary.md of the session are written")
BASELINE = Option("baseline", "DIR", "", "folder of recorded curves, with which glm4ft_baseline compares today's")
OPTIONS = (MODEL, TOKENIZER, SUBJECT, DEVICE, GPU, REPORT, BASELINE)


def describe(config: pytest.Config) -> list[str]:
    """The lines for the header of a test run: each option with its value and its source."""
    given = [option for option in OPTIONS if option.source(config) != "default"]
    lines = [f"glm4ft: {option.name}={option.value(config)} (from {option.source(config)})" for option in given]
    rest = [f"{option.name}={option.value(config) or 'none'}" for option in OPTIONS if option not in given]
    return [*lines, f"glm4ft: {', '.join(rest)} (default)"] if rest else lines


def require_legal(config: pytest.Config) -> None:
    """Refuse values of options that no test could run with.

    Raises:
        pytest.UsageError: If a value is refused; the message states the mistake and what to give instead.
    """
    _require_equals_signs(config)
    if GPU.value(config) not in GPU_MODES:
        _refuse(config, GPU, "there is no such mode", f"give one of {', '.join(GPU_MODES)}")
    device = DEVICE.value(config)
    if not (device in ("auto", "cpu", "cuda") or device.removeprefix("cuda:").isdigit()):
        _refuse(config, DEVICE, "there is no such device", "give cpu, cuda or cuda:N")
    if device == "cpu" and GPU.value(config) == "require":
        told = f"{GPU.flag}=require (from {GPU.source(config)}) needs a GPU, which may not be used on this device"
        _refuse(config, DEVICE, told, "drop one of the two")
    folder = TOKENIZER.value(config)
    if folder and not (Path(folder) / "tokenizer.json").is_file():
        problem = "there is no tokenizer.json, so no test could load the tokenizer"
        _refuse(config, TOKENIZER, problem, "give the folder that holds it")
    if MODEL.value(config).startswith(RANDOM_PREFIX):
        try:
            geometry(MODEL.value(config))
        except ConfigError as error:
            _refuse(config, MODEL, error.message, f"give {error.expected}")
    if ":" not in SUBJECT.value(config):
        _refuse(config, SUBJECT, "not the name of a subject, so no check could run", "give MODULE:ATTR")


def _require_equals_signs(config: pytest.Config) -> None:
    """Refuse a path given after a space: pytest looks for the ini file before it knows our options, and misses it."""
    arguments = config.invocation_params.args
    for option in (MODEL, TOKENIZER, REPORT, BASELINE):
        value = str(config.getoption(option.flag) or "")
        if config.inipath is None and value in arguments and Path(value).exists():
            problem = "pytest took this for the path of a test, and so found no ini file"
            raise pytest.UsageError(f"{option.flag} {value}: {problem}; write {option.flag}={value}")


def _refuse(config: pytest.Config, option: Option, problem: str, fix: str) -> None:
    raise pytest.UsageError(f"{option.flag}={option.value(config)} (from {option.source(config)}): {problem}; {fix}")
