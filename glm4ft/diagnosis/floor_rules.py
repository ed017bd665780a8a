"""Rules about what is certified of the loss: answers that contradict each other, targets the head cannot express."""

from __future__ import annotations

import math

from glm4ft.diagnosis.evidence import Evidence, TokenEvidence
from glm4ft.diagnosis.finding import Finding
from glm4ft.floors.floor import HARD_TO_REACH

# The share of the loss from which its certified part explains why a run does not get lower. Clean runs have none.
EXPLAINS = 0.5


def contradictory_samples(evidence: Evidence) -> Finding | None:
    """Equal prompts have different continuations, so no model can be right every time."""
    floor = evidence.floor
    if floor is None or not floor.entropy > 1e-3:
        return None
    lines = [f"line {sample.line} ({sample.floor:.4f})" for sample in floor.samples[:4] if sample.floor > 1e-3]
    return Finding(
        "contradictory-samples",
        "rows",
        f"Equal prompts are answered differently, so the mean loss cannot go below {floor.entropy:.4f}, whatever is "
        "trained.",
        (f"entropy {floor.entropy:.4f} of a loss of {evidence.loss:.4f}", f"in {', '.join(lines)}"),
        "keep one answer per prompt, or take the floor as the target: --target_loss floor+0.01",
        _explained(floor.entropy, evidence.loss),
    )


def unreachable_target(evidence: Evidence) -> Finding | None:
    """The frozen head cannot express some targets."""
    floor = evidence.floor
    if floor is None or not floor.head > 1e-3:
        return None
    hard = [token for token in floor.tokens if token.head > HARD_TO_REACH]
    names = ", ".join(f"{t.text} ({t.count} times, {t.floor:.2f} each)" for t in hard[:5]) or "many, each a little"
    return Finding(
        "unreachable-target",
        "model",
        f"The frozen output head cannot express some targets, so no adapter below it gets the mean loss under "
        f"{floor.floor:.4f}.",
        (
            f"certified floor {floor.floor:.4f} (gap {floor.gap:.1g}) of a loss of {evidence.loss:.4f}",
            f"by {names}",
            *([f"undecided: {', '.join(t.text for t in floor.undecided[:5])}"] if floor.undecided else []),
        ),
        "take these tokens out of the targets, train the head's rows (modules_to_save: [lm_head]), or use tokens that "
        "the base was trained to predict",
        _explained(floor.head, evidence.loss),
    )


def certified_reach(evidence: Evidence, token: TokenEvidence) -> str:
    """What is certified of the loss of one token under the frozen head; "" where there is no certificate."""
    floor = evidence.floor
    known = next((f for f in floor.tokens if f.id == token.id), None) if floor and evidence.has_head else None
    if known is None:
        return ""
    if known.head > HARD_TO_REACH:
        return (
            f" The frozen head cannot express it (an unreachable target: {known.head:.2f} nats at best, certified), so "
            "the loss stops."
        )
    if known.is_decided:
        return (
            f" The frozen head can express it ({known.head_reaches:.2f} nats were reached), so the loss may fall to 0 "
            "and show nothing of it: the mask (glm4ft inspect) and the round trip (train --round_trip true) do."
        )
    return (
        f" Whether the frozen head can express it is undecided (a loss between {known.head:.2f} and "
        f"{known.head_reaches:.2f} nats)."
    )


def floor_facts(evidence: Evidence) -> list[str]:
    """The certified floor of the mean loss beside the measured loss; empty where nothing is certified."""
    floor = evidence.floor
    if floor is None or not floor.floor > 1e-3:
        return []
    return [f"certified floor of the mean loss {floor.floor:.4f}, measured loss {evidence.loss:.4f}"]


def _explained(part: float, loss: float) -> float:
    """Return the strength with which a certified part explains the loss: 1 if it makes up most of it, else 0.4."""
    if not math.isfinite(loss):
        return 0.4
    return 1.0 if part >= EXPLAINS * loss else 0.4
