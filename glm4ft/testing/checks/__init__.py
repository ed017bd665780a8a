"""The checks of a fine-tuning pipeline, one module per stage."""

from __future__ import annotations

import importlib
import pkgutil

from glm4ft.testing.trial.registry import CHECKS, Check
from glm4ft.testing.trial.stages import STAGES


def all_checks() -> list[Check]:
    """Every check, in the order of the stages."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(CHECKS, key=lambda check: STAGES.index(check.stage))
