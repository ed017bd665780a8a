"""The rules of a diagnosis, in the order in which their findings become the verdict.

What is trained comes before how it is trained: a wrong target explains a bad curve, a curve explains no target.
"""

from __future__ import annotations

from glm4ft.curve_rules import (
    LEARNT_LOSS,
    numerics,
    rate_too_high,
    rate_too_low,
    reload_differs,
    schedule_ended_early,
    still_falling,
    wrong_start,
)
from glm4ft.diagnosis import Finding, Rule
from glm4ft.evidence import Evidence
from glm4ft.mask_rules import (
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
from glm4ft.wiring_rules import adapters_dead, adapters_missing, held_by_decay, samples_not_learnt, training_stopped

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


def nothing_found(evidence: Evidence) -> Finding:
    """What is left when no rule is certain of anything."""
    wrong = [turn for turn in evidence.round_trips if turn.supervised and not turn.exact]
    if wrong and evidence.loss < LEARNT_LOSS:
        return Finding(
            "inference-differs",
            "outcome",
            f"The loss is {evidence.loss:.4f}, yet {len(wrong)} of {len(evidence.round_trips)} turns do not come back.",
            tuple(turn.describe().split("\n")[0] for turn in wrong[:3]),
            "compare the prompt that inference sends with the row that was trained, token by token",
        )
    if evidence.loss < LEARNT_LOSS:
        text = f"The loss is {evidence.loss:.4f} and nothing is wrong that can be seen from here."
        return Finding("learnt", "outcome", text, (), "nothing to do")
    if not evidence.is_whole:
        text = (
            f"The loss is {evidence.loss:.4f}, on more conversations than are learnt by heart; nothing is wrong that "
            "can be seen from here."
        )
        return Finding("trained", "outcome", text, (), "judge it on held-out conversations (--eval_data)")
    text = f"The loss is {evidence.loss:.4f}, and nothing that was looked at explains it."
    return Finding("unexplained", "outcome", text, (), "look at the tokens that hold the loss, and run glm4ft check")
