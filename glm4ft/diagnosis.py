"""From evidence to a verdict in plain words: why does the loss not fall, or the model not stop?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm4ft.evidence import Evidence

SHOWN_TOKENS = 20  # in the JSON; the evidence has all
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
            "findings": [_finite(vars(finding)) for finding in self.findings],
            "tokens": [_finite(vars(token)) for token in self.evidence.worst_tokens[:SHOWN_TOKENS]],
        }


def diagnose(evidence: Evidence) -> Diagnosis:
    """Judge a run.

    Args:
        evidence: what was measured of it.
    Returns:
        The diagnosis. Its verdict is the first finding, in the order of the rules, that the evidence makes certain;
        weaker ones follow.
    """
    from glm4ft.diagnosis_rules import RULES, nothing_found

    findings = [finding for rule in RULES if (finding := rule(evidence)) is not None]
    findings.sort(key=lambda finding: finding.strength < CERTAIN)
    if not findings or findings[0].strength < CERTAIN:
        findings.insert(0, nothing_found(evidence))
    return Diagnosis(tuple(findings), evidence)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite as null, beside ``"finite": false``: JSON knows neither NaN nor Infinity."""
    kept = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}
    is_whole = all(kept[name] is not None or value is None for name, value in record.items())
    return kept if is_whole else {**kept, "finite": False}
