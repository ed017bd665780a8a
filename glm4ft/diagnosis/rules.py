"""The rules of a diagnosis, in the order in which their findings become the verdict.

Rules about the targets come before rules about the curve: a wrong target explains a bad curve, but not vice versa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glm4ft.diagnosis.adapter_rules import (
    adapters_dead,
    adapters_missing,
    held_by_decay,
    samples_not_learnt,
    training_stopped,
)
from glm4ft.diagnosis.curve_rules import (
    LEARNT_LOSS,
    numerics,
    rate_too_high,
    rate_too_low,
    reload_differs,
    schedule_ended_early,
    still_falling,
    wrong_start,
)
from glm4ft.diagnosis.evidence import Evidence
from glm4ft.diagnosis.finding import CERTAIN, Finding, Rule
from glm4ft.diagnosis.mask_rules import (
    contradictory_samples,
    header_supervised,
    labels_shifted,
    not_as_served,
    prompt_supervised,
    terminator_never_learned,
    truncated_answers,
    turns_not_trained,
    unreachable_target,
    zero_targets,
)
from glm4ft.files import finite_or_null

SHOWN_TOKENS = 20  # in the JSON; the evidence holds all tokens

RULES: tuple[Rule, ...] = (
    zero_targets,
    prompt_supervised,
    header_supervised,
    truncated_answers,
    terminator_never_learned,
    turns_not_trained,
    contradictory_samples,
    unreachable_target,
    not_as_served,
    numerics,
    adapters_missing,
    adapters_dead,
    training_stopped,
    labels_shifted,
    wrong_start,
    reload_differs,
    samples_not_learnt,
    rate_too_high,
    schedule_ended_early,
    rate_too_low,
    held_by_decay,
    still_falling,
)


@dataclass(frozen=True)
class Diagnosis:
    """The findings about a run.

    Args:
        findings: The findings, never empty: the verdict first, the others in the order in which to examine them.
        evidence: The evidence that the findings are based on.
    """

    findings: tuple[Finding, ...]
    evidence: Evidence

    @property
    def verdict(self) -> str:
        """The slug of the first finding."""
        return self.findings[0].verdict

    @property
    def stage(self) -> str:
        """The stage of the first finding."""
        return self.findings[0].stage

    @property
    def text(self) -> str:
        """The description of the first finding."""
        return self.findings[0].text

    def record(self) -> dict[str, Any]:
        """Return the object that ``glm4ft explain --json`` writes."""
        return {
            "schema": 1,
            "verdict": self.verdict,
            "stage": self.stage,
            "text": self.text,
            "evidence": list(self.findings[0].evidence),
            "remedy": self.findings[0].remedy,
            "findings": [finite_or_null(vars(finding)) for finding in self.findings],
            "tokens": [finite_or_null(vars(token)) for token in self.evidence.worst_tokens[:SHOWN_TOKENS]],
        }


def diagnose(evidence: Evidence) -> Diagnosis:
    """Judge a run.

    Args:
        evidence: The measurements of the run.
    Returns:
        The diagnosis. Its verdict is the first finding, in the order of the rules, with a strength of at least
        ``CERTAIN``; weaker findings follow.
    """
    findings = [finding for rule in RULES if (finding := rule(evidence)) is not None]
    findings.sort(key=lambda finding: finding.strength < CERTAIN)
    if not findings or findings[0].strength < CERTAIN:
        findings.insert(0, nothing_found(evidence))
    return Diagnosis(tuple(findings), evidence)


def nothing_found(evidence: Evidence) -> Finding:
    """Return the finding for a run about which no rule is certain."""
    wrong = [turn for turn in evidence.round_trips if turn.supervised and not turn.exact]
    if wrong and evidence.loss < LEARNT_LOSS:
        return Finding(
            "inference-differs",
            "outcome",
            f"The loss is {evidence.loss:.4f}, but {len(wrong)} of {len(evidence.round_trips)} turns are not "
            "reproduced exactly.",
            tuple(turn.describe().split("\n")[0] for turn in wrong[:3]),
            "compare the prompt that inference sends with the row that was trained, token by token",
        )
    if evidence.loss < LEARNT_LOSS:
        text = f"The loss is {evidence.loss:.4f}, and the diagnosis found no fault."
        return Finding("learnt", "outcome", text, (), "nothing to do")
    if not evidence.is_whole:
        text = (
            f"The loss is {evidence.loss:.4f}, on more conversations than a run memorises, and the diagnosis found no "
            "fault."
        )
        return Finding("trained", "outcome", text, (), "judge it on held-out conversations (--eval_data)")
    text = f"The loss is {evidence.loss:.4f}, and no rule of the diagnosis explains it."
    return Finding("unexplained", "outcome", text, (), "look at the tokens with the largest losses; run glm4ft check")
