"""Rules about the evaluations that a log has: not finite, unmoved, rising, or no lower for as long as patience was."""

from __future__ import annotations

import math
import statistics

from glm4ft.diagnosis.evidence import Evaluation, Evidence
from glm4ft.diagnosis.finding import Finding

# The last evaluation is above the best one by this share and by this many nats, more than evaluations on the same rows
# differ from one checkpoint to the next.
RISEN, RISEN_NATS = 0.03, 0.02
# With one evaluation after the best, the rise has to be larger to be no accident.
RISEN_AT_ONCE = 0.1
# The share by which the training loss fell meanwhile; and the share that it may rise by, in the noise of its batches,
# where it is at its end already. If it rises with the evaluations, the run diverges.
FALLEN, NOT_RISEN = 0.05, 0.1
# The share of the evaluation loss below which the training loss is far from it: a held-out set of the same kind is
# within a third of it where a run does not learn by heart.
APART = 0.5
UNMOVED = 1e-6  # relative difference below which evaluations are of the same weights
LEAST_UNMOVED = 3


def evaluation_not_finite(evidence: Evidence) -> Finding | None:
    """Evaluations are NaN, infinite or exactly 0 although the training loss is an ordinary number."""
    bad = [e for e in evidence.evaluations if not math.isfinite(e.loss) or e.loss == 0]
    losses = evidence.losses
    if not bad or not losses or not losses[-1] > 0:
        return None
    is_zero = all(e.loss == 0 for e in bad)
    value = "exactly 0" if is_zero else "NaN" if math.isnan(bad[0].loss) else "infinite"
    return Finding(
        "evaluation-not-finite",
        "outcome",
        f"The evaluation loss is {value} at step {bad[0].step}, while the training loss there is an ordinary number: "
        "evaluation rows have no target (a mean over nothing), or the evaluation overflows in fp16.",
        (
            f"{len(bad)} of {len(evidence.evaluations)} evaluations",
            f"training loss beside it: {_beside(evidence, bad[0]):.4g}",
        ),
        "look at the labels of the evaluation set: prompts alone, or answers cut by the length limit, leave only -100; "
        "evaluate in bf16 (fp16_full_eval: false)",
        0.9,
    )


def evaluation_unmoved(evidence: Evidence) -> Finding | None:
    """All evaluations are equal to the last digit while the training loss falls."""
    found = [e.loss for e in evidence.evaluations if math.isfinite(e.loss) and e.loss > 0]
    if (
        len(found) < LEAST_UNMOVED
        or max(found) - min(found) > UNMOVED * max(found)
        or not _change(evidence, 0) < -FALLEN
    ):
        return None
    return Finding(
        "evaluation-unmoved",
        "side-effects",
        f"All {len(found)} evaluations are {found[0]:.4f} to the last digit, while the training loss falls: they are "
        "of weights that nobody trains, such as the base without its adapter.",
        (f"training loss {evidence.losses[0]:.4f} to {evidence.losses[-1]:.4f}",),
        "evaluate the model that is trained, with its adapters switched on; compare an evaluation of the base alone",
        0.9,
    )


def over_fitting(evidence: Evidence) -> Finding | None:
    """The evaluation loss rises from some step on while the training loss falls."""
    found = [e for e in evidence.evaluations if math.isfinite(e.loss)]
    if len(found) < 2 or evidence.target_loss is not None:  # with a target, the rows are to be learnt by heart
        return None
    best = min(found, key=lambda e: e.loss)
    later = [e for e in found if e.step > best.step]
    if not later:
        return None
    # the level at the end, not the last value alone: evaluations differ a little from one to the next
    end = statistics.median(e.loss for e in later[-3:])
    rise = RISEN if len(later) > 1 else RISEN_AT_ONCE
    if (
        not end > best.loss * (1 + rise)
        or not end > best.loss + RISEN_NATS
        or not _change(evidence, best.step) < NOT_RISEN
    ):
        return None
    return Finding(
        "over-fitting",
        "outcome",
        f"Over-fitting since step {best.step}: the evaluation loss rises from {best.loss:.4g} there to "
        f"{later[-1].loss:.4g} at step {later[-1].step}, while the training loss is at {evidence.losses[-1]:.4g}.",
        (
            f"best evaluation: {best.loss:.4g} at step {best.step}" + _epoch(evidence, best.step),
            f"evaluations: {', '.join(f'{e.loss:.3g}' for e in found[:12])}",
        ),
        f"{_best_checkpoint(evidence, best)}; train for fewer epochs, on more conversations, or with a lower rate or "
        "rank",
        0.95,
    )


def evaluation_apart(evidence: Evidence) -> Finding | None:
    """The evaluation loss stays where it is, far above the training loss, which falls."""
    found = [e for e in evidence.evaluations if math.isfinite(e.loss)]
    if len(found) < LEAST_UNMOVED or evidence.target_loss is not None or not evidence.losses:
        return None
    low, high = min(e.loss for e in found), max(e.loss for e in found)
    trained = statistics.median(evidence.losses[-5:])
    if not (high - low <= RISEN * low and trained < APART * low and _change(evidence, 0) < -FALLEN):
        return None
    return Finding(
        "evaluation-apart",
        "outcome",
        f"The evaluation loss stays at {found[-1].loss:.4g} while the training loss falls to {trained:.4g}: what is "
        "learnt does not carry over. The evaluation conversations are of another kind, are rendered or masked "
        "otherwise, or the run had learnt its own by heart before the first evaluation.",
        (f"evaluations: {', '.join(f'{e.loss:.3g}' for e in found[:12])}",),
        "evaluate some of the training conversations: if their loss is high, too, rows or mask of the evaluation "
        "differ (glm4ft inspect); if it is low, train for fewer steps on more conversations",
        0.8,
    )


def stopped_by_patience(evidence: Evidence) -> Finding | None:
    """The run ended as it was asked to, after evaluations that were no better than the best."""
    ended = int(evidence.options.get("patience_ended") or 0)
    best = min((e for e in evidence.evaluations if math.isfinite(e.loss)), key=lambda e: e.loss, default=None)
    if not ended or best is None:
        return None
    is_kept = bool(evidence.options.get("keep_best"))
    return Finding(
        "stopped-by-patience",
        "outcome",
        f"Its own patience ended the run at step {ended}: the evaluation loss was lowest at step {best.step} "
        f"({best.loss:.4g}). {evidence.options.get('patience') or 'The'} evaluations after it were no lower.",
        ("the adapter is that of the best evaluation" if is_kept else "the adapter is that of the last step",),
        "more conversations would take it further, more steps on these would not"
        if is_kept
        else _best_checkpoint(evidence, best),
        0.6,
    )


def _change(evidence: Evidence, since: int) -> float:
    """The change of the training loss from a step to the end, as a share; NaN if nothing is logged after it."""
    known = [(p.step, p.loss) for p in evidence.curve if p.loss is not None and math.isfinite(p.loss)]
    before = [loss for step, loss in known if step <= max(since, 1)]
    after = [loss for step, loss in known if step > since]
    if not after:
        return math.nan
    then = statistics.median(before[-5:]) if before else after[0]
    return statistics.median(after[-5:]) / max(then, 1e-30) - 1


def _beside(evidence: Evidence, evaluation: Evaluation) -> float:
    known = [p for p in evidence.curve if p.loss is not None]
    return min(known, key=lambda p: abs(p.step - evaluation.step)).loss or 0.0 if known else math.nan


def _epoch(evidence: Evidence, step: int) -> str:
    at = next((p.epoch for p in evidence.curve if p.epoch is not None and p.step >= step), None)
    return f", epoch {at:.2g}" if at is not None else ""


def _best_checkpoint(evidence: Evidence, best: Evaluation) -> str:
    saved = evidence.sources.checkpoints
    if best.step in saved:
        return f"take checkpoint-{best.step}, the best one"
    near = min(saved, key=lambda step: abs(step - best.step), default=None)
    nearest = f" (the nearest that is there is checkpoint-{near})" if near is not None else ""
    option = "--keep_best true, or load_best_model_at_end"
    return f"the best checkpoint is that of step {best.step}{nearest}: keep it with {option}"
