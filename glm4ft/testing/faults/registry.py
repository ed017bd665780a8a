"""The registry of faults: each is a healthy pipeline with one part overridden, and the verdict that it must get.

Most are bugs of real code; some are made up beside them, where a check could miss what no public report shows.
To add one, define a subclass of the plain loop in the module of its stage, with a docstring that states the bug in one
sentence. Stage and pattern of the cause are fixed before the fault is first run.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from glm4ft.errors import ConfigError
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.trial.stages import STAGES

FAULT_MODULES = (
    "rows_rendering", "rows_mask", "rows_reasoning", "batches", "model", "gradient", "losses", "clipping", "schedule",
    "update", "side_effects", "persistence", "export", "outcome", "varied_plans", "not_finite", "user_variations",
    "randomness", "requested_settings", "token_weights", "rates_by_group", "long_rows", "master_copies",
)  # fmt: skip

MADE_UP = "made up: no public report"  # the evidence of a fault that was not found in real code

# Environment variable with further modules that register faults or variations, separated by commas; worker processes
# inherit it.
EXTERNAL_MODULES = "GLM4FT_FAULT_MODULES"

FAULTS: dict[str, Fault] = {}
Kind = TypeVar("Kind", bound=type[Subject])


@dataclass(frozen=True)
class Fault:
    """A bug that does not stop the run.

    Args:
        id: The id in the catalogue.
        stage: The stage that the verdict must name.
        evidence: The repositories in which it occurred, with numbers of issues, pull requests or commits; or
            ``MADE_UP``, if it is made up beside real ones.
        cause: A regular expression that the message of the first failing check matches if it names the cause.
        subject: The class of the pipeline with the bug.
        because: The reason if the stage differs from the catalogue's heading; "" if it does not.
        simulated: How the effect is simulated, if the mechanism cannot occur on a CPU or in the plain loop; else "".
    """

    id: str
    stage: str
    evidence: str
    cause: str
    subject: type[Subject]
    because: str = ""
    simulated: str = ""

    @property
    def story(self) -> str:
        """The bug, in one sentence."""
        return " ".join((self.subject.__doc__ or "").split("\n\n")[0].split())


def load_external() -> None:
    """Import the modules that ``EXTERNAL_MODULES`` names; those in the working directory are found too.

    Raises:
        ConfigError: If one cannot be imported.
    """
    names = [name for name in os.environ.get(EXTERNAL_MODULES, "").split(",") if name]
    if names and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                "the module of faults cannot be imported", where="--module", found=f"{name}: {error}",
                fix="run the command where the module is, or put its folder on PYTHONPATH",
            ) from error  # fmt: skip


def faults_at(stage: str) -> Callable[..., Callable[[Kind], Kind]]:
    """Create the decorator that registers the faults of one stage.

    Args:
        stage: The stage that the verdict of these faults must name.
    Raises:
        ValueError: If there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"{stage} is not a stage; the stages are {', '.join(STAGES)}")

    def fault(
        id: str, *, evidence: str, cause: str, because: str = "", simulated: str = "", processes: int = 1
    ) -> Callable[[Kind], Kind]:
        def register(subject: Kind) -> Kind:
            if id in FAULTS:
                raise ValueError(f"{id} is already registered")
            subject.name, subject.distributed = id, processes > 1
            FAULTS[id] = Fault(id, stage, evidence, cause, subject, because, simulated)
            return subject

        return register

    return fault


def all_faults() -> dict[str, Fault]:
    """All faults by id, in the order of the stages: those of the package, and those of ``EXTERNAL_MODULES``."""
    for module in FAULT_MODULES:
        importlib.import_module(f"glm4ft.testing.faults.{module}")
    load_external()
    return dict(sorted(FAULTS.items(), key=lambda item: STAGES.index(item[1].stage)))


class ServedRight(Subject):
    """A pipeline whose training text is wrong while its serving prompt is right."""

    @cached_property
    def healthy(self) -> Subject:
        """The pipeline without the fault."""
        return Subject(self.tokenizer.name_or_path)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The serving prompt of the healthy pipeline."""
        return self.healthy.prompt(messages, tools)
