"""What a fault is: a healthy pipeline with one thing overridden, and what the suite has to say about it.

Adding one takes a few lines in the module of its stage: a subclass of the plain loop whose docstring tells the story in
one sentence. Stage and words of the cause are fixed before the fault is first run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.trial.stages import STAGES

FAULT_MODULES = (
    "rows_rendering", "rows_mask", "batches", "model", "gradient", "clipping", "schedule", "update",
    "side_effects", "persistence", "export", "outcome",
)  # fmt: skip

FAULTS: dict[str, Fault] = {}
Kind = TypeVar("Kind", bound=type[Subject])


@dataclass(frozen=True)
class Fault:
    """A bug that occurred in real code and did not stop the run.

    Args:
        id: as in the catalogue.
        stage: that the verdict has to name.
        evidence: repositories with numbers of issues, pull requests or commits.
        cause: regular expression that the message of the first failing check matches if it names the cause.
        subject: the pipeline with the bug.
        because: why the stage is another than the catalogue's heading says; "" if it is that one.
        simulated: how the effect is put here, where the mechanism itself cannot be had on a CPU or in the plain loop.
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
        """What is wrong, in one sentence."""
        return " ".join((self.subject.__doc__ or "").split("\n\n")[0].split())


def faults_at(stage: str) -> Callable[..., Callable[[Kind], Kind]]:
    """The decorator of one stage's module."""
    if stage not in STAGES:
        raise ValueError(f"{stage} is no stage; the stages are {', '.join(STAGES)}")

    def fault(
        id: str, *, evidence: str, cause: str, because: str = "", simulated: str = "", processes: int = 1
    ) -> Callable[[Kind], Kind]:
        def register(subject: Kind) -> Kind:
            if id in FAULTS:
                raise ValueError(f"{id} is registered already")
            subject.name, subject.distributed = id, processes > 1
            FAULTS[id] = Fault(id, stage, evidence, cause, subject, because, simulated)
            return subject

        return register

    return fault


def all_faults() -> dict[str, Fault]:
    """Every fault by its id, in the order of the stages."""
    for module in FAULT_MODULES:
        importlib.import_module(f"glm4ft.testing.faults.{module}")
    return dict(sorted(FAULTS.items(), key=lambda item: STAGES.index(item[1].stage)))


class ServedRight(Subject):
    """A pipeline whose training text is wrong while serving sends what it should."""

    @cached_property
    def healthy(self) -> Subject:
        """The pipeline without the fault."""
        return Subject(self.tokenizer.name_or_path)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """What the healthy pipeline sends."""
        return self.healthy.prompt(messages, tools)
