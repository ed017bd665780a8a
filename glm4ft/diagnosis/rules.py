"""The rules of a diagnosis, in the order in which their findings become the verdict.

Rules about the targets come before rules about the curve: a wrong target explains a bad curve, but not vice versa.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm4ft.diagnosis.adapter_rules import (
    adapters_dead,
    adapters_missing,
    held_by_decay,
    reload_differs,
    samples_not_learnt,
)
from glm4ft.diagnosis.curve import fall
from glm4ft.diagnosis.curve_rules import (
    LEARNT_LOSS,
    not_falling,
    rate_too_high,
    rate_too_low,
    schedule_ended_early,
    still_falling,
)
from glm4ft.diagnosis.evaluation_rules import (
    evaluation_apart,
    evaluation_not_finite,
    evaluation_unmoved,
    over_fitting,
    stopped_by_patience,
)
from glm4ft.diagnosis.evidence import Evidence
from glm4ft.diagnosis.finding import CERTAIN, Finding, Rule
from glm4ft.diagnosis.floor_rules import contradictory_samples, unreachable_target
from glm4ft.diagnosis.mask_rules import (
    header_supervised,
    labels_shifted,
    not_as_served,
    prompt_supervised,
    terminator_never_learned,
    truncated_answers,
    turns_not_trained,
    zero_targets,
)
from glm4ft.diagnosis.numerics_rules import memorised, negative_loss, numerics, zero_loss
from glm4ft.diagnosis.resume_rules import resume_lost_state
from glm4ft.diagnosis.standstill_rules import losses_repeat, no_gradient, rate_zero, training_stopped
from glm4ft.diagnosis.start_rules import loss_not_a_mean, wrong_start
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
    zero_loss,
    negative_loss,
    adapters_missing,
    adapters_dead,
    rate_zero,
    no_gradient,
    losses_repeat,
    training_stopped,
    labels_shifted,
    loss_not_a_mean,
    wrong_start,
    reload_differs,
    samples_not_learnt,
    resume_lost_state,
    over_fitting,
    evaluation_not_finite,
    evaluation_unmoved,
    evaluation_apart,
    rate_too_high,
    schedule_ended_early,
    rate_too_low,
    held_by_decay,
    stopped_by_patience,
    memorised,
    still_falling,
    not_falling,
)

# What a finding explains is not found a second time.
EXPLAINED: Mapping[str, frozenset[str]] = {
    "numerics": frozenset({"zero-loss", "memorised", "not-falling", "rate-too-high"}),
    "zero-loss": frozenset({"memorised", "not-falling"}),
    "negative-loss": frozenset({"memorised", "not-falling", "still-falling", "rate-too-high"}),
    "rate-zero": frozenset({"updates-without-effect", "training-stopped", "not-falling"}),
    "no-gradient": frozenset({"updates-without-effect", "training-stopped", "not-falling"}),
    "updates-without-effect": frozenset({"not-falling"}),
    "training-stopped": frozenset({"not-falling"}),
    "loss-not-a-mean": frozenset({"wrong-start", "still-falling"}),
    "wrong-start": frozenset({"still-falling"}),
    "resume-lost-state": frozenset({"rate-too-high", "not-falling"}),
    "over-fitting": frozenset({"stopped-by-patience", "still-falling", "memorised"}),
    "evaluation-apart": frozenset({"still-falling", "memorised"}),
    "stopped-by-patience": frozenset({"still-falling", "memorised", "not-falling"}),
    "rate-too-high": frozenset({"not-falling"}),
    "rate-too-low": frozenset({"not-falling", "still-falling"}),
    "schedule-ended-early": frozenset({"not-falling"}),
}


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
            "looked_at": list(self.evidence.sources.looked_at),
            "not_looked_at": [*self.evidence.sources.unread, *self.evidence.sources.unknown],
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
    found = [finding for rule in RULES if (finding := rule(evidence)) is not None]
    explained = {
        other for finding in found if finding.strength >= CERTAIN for other in EXPLAINED.get(finding.verdict, ())
    }
    findings = [finding for finding in found if finding.verdict not in explained]
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
    if evidence.sources.unread:
        return Finding(
            "undecided",
            "outcome",
            f"The log shows no fault (last loss {evidence.loss:.4f}), but not everything that the folder has was "
            "looked at, and a log alone does not show a wrong mask, an answer without an end, or weights that were "
            "saved badly.",
            tuple(f"not looked at: {name}" for name in evidence.sources.unread),
            "name what it was trained on: --data or --rows, and --model",
        )
    # a logged loss of exactly 0 was never computed
    is_shown = evidence.is_measured or (evidence.target_loss is not None and evidence.loss > 0)
    if is_shown and evidence.loss < LEARNT_LOSS:
        text = f"The loss is {evidence.loss:.4f}, and the diagnosis found no fault."
        return Finding("learnt", "outcome", text, (), "nothing to do")
    if not evidence.is_whole and evidence.losses:
        # that something was learnt has to be seen, not only that nothing is wrong
        return _trained(evidence) if fall(evidence.losses).is_falling else _too_noisy(evidence)
    text = f"The loss is {evidence.loss:.4f}, and no rule of the diagnosis explains it."
    return Finding("unexplained", "outcome", text, (), "look at the tokens with the largest losses; run glm4ft check")


def _too_noisy(evidence: Evidence) -> Finding:
    losses = evidence.losses
    change = fall(losses)
    return Finding(
        "undecided",
        "outcome",
        f"{len(losses)} logged losses do not show whether anything was learnt: from the first ones to the second half "
        f"the loss changes by {change.change:+.3f} +- {change.error:.3f} nats, in the noise of the batches.",
        (f"last loss {evidence.loss:.4f}",),
        "train for more steps, log the mean of more of them, and evaluate on held-out conversations",
    )


def _trained(evidence: Evidence) -> Finding:
    losses, found = evidence.losses, [e for e in evidence.evaluations if math.isfinite(e.loss)]
    best = min(found, key=lambda e: e.loss, default=None)
    text = (
        f"The loss went from {losses[0]:.4f} to {evidence.loss:.4f}, on more conversations than a run memorises, and "
        "the diagnosis found no fault in what it looked at."
    )
    facts = (f"evaluations: last {found[-1].loss:.4f}, best {best.loss:.4f} at step {best.step}",) if best else ()
    remedy = (
        f"the best evaluation is that of step {best.step}"
        if best
        else "judge it on held-out conversations (--eval_data)"
    )
    return Finding("trained", "outcome", text, facts, remedy)
