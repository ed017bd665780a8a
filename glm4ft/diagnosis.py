"""From evidence to a verdict in plain words: why does the loss not fall, or the model not stop?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm4ft.evidence import Evidence, TokenEvidence

SHOWN_TOKENS = 20  # in the JSON; the evidence has all


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


@dataclass(frozen=True)
class Diagnosis:
    """What is the matter with a run.

    Args:
        findings: the verdict first; the others in the order in which they should be looked at. Never empty.
        evidence: what they were drawn from.
    """

    findings: tuple[Finding, ...]
    evidence: Evidence

    @property
    def verdict(self) -> str:
        """Slug of the first finding."""
        return self.findings[0].verdict

    @property
    def stage(self) -> str:
        """Stage of the first finding."""
        return self.findings[0].stage

    @property
    def text(self) -> str:
        """The first finding in plain words."""
        return self.findings[0].text

    def record(self) -> dict[str, Any]:
        """The object that ``glm4ft explain --json`` writes."""
        return {
            "schema": 1,
            "verdict": self.verdict,
            "stage": self.stage,
            "text": self.text,
            "evidence": list(self.findings[0].evidence),
            "remedy": self.findings[0].remedy,
            "findings": [vars(finding) for finding in self.findings],
            "tokens": [_token_record(token) for token in self.evidence.worst_tokens[:SHOWN_TOKENS]],
        }


Rule = Callable[[Evidence], Finding | None]


def diagnose(evidence: Evidence) -> Diagnosis:
    """Judge a run.

    Args:
        evidence: what was measured of it.
    Returns:
        The diagnosis; its first finding is the verdict.
    """
    from glm4ft.diagnosis_rules import RULES

    findings = [finding for rule in RULES if (finding := rule(evidence)) is not None]
    return Diagnosis(tuple(findings), evidence)


def _token_record(token: TokenEvidence) -> dict[str, Any]:
    return {name: _finite(value) for name, value in vars(token).items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
