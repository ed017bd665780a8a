"""What a benign variation is: a healthy pipeline that differs from the plain loop, on which no check may fail."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from glm4ft.testing.faults.registry import load_external
from glm4ft.testing.subjects.plain_loop import Subject

VARIATION_MODULES = ("benign", "benign_practices", "benign_optimizers", "benign_requests")

VARIATIONS: dict[str, Variation] = {}
Kind = TypeVar("Kind", bound=type[Subject])


@dataclass(frozen=True)
class Variation:
    """A healthy pipeline that differs from the plain loop.

    Args:
        id: The id that reports show.
        subject: The class of the pipeline.
    """

    id: str
    subject: type[Subject]

    @property
    def story(self) -> str:
        """The difference from the plain loop, in one sentence."""
        return " ".join((self.subject.__doc__ or "").split("\n\n")[0].split())


def variation(id: str, processes: int = 1) -> Callable[[Kind], Kind]:
    """Decorator that registers a variation.

    Args:
        id: The id that reports show.
        processes: 2 to run the checks of several processes too, which take long; 1 by default.
    Raises:
        ValueError: By the decorator, if the id is taken.
    """

    def register(subject: Kind) -> Kind:
        if id in VARIATIONS:
            raise ValueError(f"{id} is already registered")
        subject.name, subject.distributed = id, processes > 1
        VARIATIONS[id] = Variation(id, subject)
        return subject

    return register


def all_variations() -> dict[str, Variation]:
    """Every variation by its id, in the order of the modules."""
    for module in VARIATION_MODULES:
        importlib.import_module(f"glm4ft.testing.faults.{module}")
    load_external()
    return VARIATIONS
