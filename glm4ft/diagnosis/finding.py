"""The type of a finding, which a rule of the diagnosis draws from the evidence of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from glm4ft.diagnosis.evidence import Evidence

CERTAIN = 0.5  # smallest strength of a finding that can be the verdict


@dataclass(frozen=True)
class Finding:
    """A fault of a run, or the statement that it has none.

    Args:
        verdict: The slug of the finding, such as ``header-supervised``.
        stage: The slug of its stage of training, as in ``glm4ft check``.
        text: A description of the fault in one or two sentences, for readers who do not know the code.
        evidence: The figures that support the finding, a sentence each.
        remedy: The advice to the user.
        strength: The certainty of the finding, from 0 to 1.
    """

    verdict: str
    stage: str
    text: str
    evidence: tuple[str, ...]
    remedy: str
    strength: float = 1.0


Rule = Callable[[Evidence], Finding | None]
