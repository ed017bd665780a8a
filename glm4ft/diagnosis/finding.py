"""What a rule of the diagnosis finds in the evidence of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from glm4ft.diagnosis.evidence import Evidence

CERTAIN = 0.5  # strength from which a finding can be the verdict, in the order of the rules


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or right, with a run.

    Args:
        verdict: slug, as ``header-supervised``.
        stage: slug of the stage of training it belongs to, as in ``glm4ft check``.
        text: what is the matter, in one or two sentences for someone who does not know the code.
        evidence: the figures it rests on, a sentence each.
        remedy: what to do.
        strength: from 0 to 1; how sure the evidence makes it.
    """

    verdict: str
    stage: str
    text: str
    evidence: tuple[str, ...]
    remedy: str
    strength: float = 1.0


Rule = Callable[[Evidence], Finding | None]
