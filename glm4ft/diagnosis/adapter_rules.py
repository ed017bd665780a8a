"""Rules about updates: missing adapters, adapters without effect, rows that are never trained, weight decay."""

from __future__ import annotations

import math
import statistics

from glm4ft.diagnosis.curve_rules import LEARNT_LOSS, LEAST_STEPS
from glm4ft.diagnosis.evidence import Evidence
from glm4ft.diagnosis.finding import Finding

# A row is learnt below the first mean loss, and not learnt above the second; clean runs have all rows on one side.
ROW_LEARNT, ROW_NOT_LEARNT = 0.1, 0.5
CONSTANT = 1e-6  # relative difference below which losses are equal; steps that change the weights differ by more
FLAT_STEPS = 5


def adapters_missing(evidence: Evidence) -> Finding | None:
    """There is no adapter, or a requested target has none."""
    adapters = evidence.adapters
    if adapters is None or (adapters.num_adapters and not adapters.wanted_but_missing):
        return None
    missing = ", ".join(adapters.wanted_but_missing) or "all"
    has = ", ".join(f"{number} on {name}" for name, number in adapters.targets.items()) or "none"
    return Finding(
        "adapters-missing",
        "model",
        f"Targets that were asked for have no adapter: {missing}.",
        (f"adapters there are: {has}",),
        "name modules that the base has: GLM-4 has q_proj, k_proj, v_proj, o_proj, gate_up_proj (fused) and down_proj",
        0.4 if adapters.num_adapters else 1.0,
    )


def adapters_dead(evidence: Evidence) -> Finding | None:
    """Adapters have no effect, because no update has ever reached them."""
    adapters = evidence.adapters
    if adapters is None or not adapters.num_adapters:
        return None
    num_dead = len(adapters.dead)
    if not num_dead:
        return None
    is_all = num_dead == adapters.num_adapters
    frozen = " No parameter is trainable." if adapters.num_trainable == 0 else ""
    return Finding(
        "adapters-dead",
        "model",
        f"{'All' if is_all else num_dead} of {adapters.num_adapters} adapters still have their initial values and no "
        f"effect: no update has reached them.{frozen}",
        (
            f"first: {adapters.dead[0]}",
            f"the trained model's loss is {evidence.loss:.4f}, the base's {_base(evidence)}",
        ),
        "create the optimizer from the parameters that require a gradient, after the adapters are attached; to train a "
        "loaded adapter, load it with is_trainable=True",
        1.0 if is_all else 0.6,
    )


def training_stopped(evidence: Evidence) -> Finding | None:
    """The loss is constant to the last digit from some step on."""
    losses = [(p.step, p.loss) for p in evidence.curve if p.loss is not None and math.isfinite(p.loss)]
    if len(losses) < LEAST_STEPS or not evidence.loss > LEARNT_LOSS:
        return None
    last = losses[-1][1]
    flat = [step for step, loss in losses if abs(loss - last) <= CONSTANT * abs(last)]
    if len(flat) < FLAT_STEPS or flat[0] not in [step for step, _ in losses[-len(flat) :]]:
        return None
    return Finding(
        "training-stopped",
        "side-effects",
        f"From step {flat[0]} on the loss stays at {last:.4f} to the last digit: the updates have no effect any more.",
        (f"{len(flat)} equal losses", f"loss before: {losses[0][1]:.4f}"),
        "look for what froze the parameters at that step: a save, an evaluation, a conversion",
        0.9,
    )


def samples_not_learnt(evidence: Evidence) -> Finding | None:
    """Some rows were memorised, and others were not learnt at all."""
    known = [row for row in evidence.rows if row.loss < ROW_LEARNT]
    unknown = [row for row in evidence.rows if row.loss > ROW_NOT_LEARNT]
    if not evidence.is_whole or not known or not unknown:
        return None
    lines = ", ".join(f"line {row.line} ({row.loss:.2f})" for row in unknown[:5])
    return Finding(
        "samples-not-learnt",
        "gradient",
        f"{len(unknown)} of {len(evidence.rows)} rows were not learnt at all, although others were memorised: their "
        "gradient never reached an update.",
        (f"not learnt: {lines}", f"learnt: {len(known)} rows, mean loss {statistics.fmean(r.loss for r in known):.4f}"),
        "clear gradients once per optimizer step, not per micro-batch, and check that every row is trained",
        0.8,
    )


def held_by_decay(evidence: Evidence) -> Finding | None:
    """The loss has converged well above its floor, although gradients are not zero."""
    decay = float(evidence.options.get("weight_decay") or 0)
    losses = [p.loss for p in evidence.curve if p.loss is not None and math.isfinite(p.loss)]
    floor = evidence.floor.floor if evidence.floor else 0.0
    if not evidence.is_whole or len(losses) < LEAST_STEPS or not evidence.loss > floor + LEARNT_LOSS:
        return None
    length = max(3, len(losses) // 5)
    tail, middle = losses[-length:], losses[len(losses) // 2 : -length]
    if not middle or not statistics.median(tail) > 0.8 * statistics.median(middle):
        return None
    resting, before = statistics.median(tail), statistics.median(middle)
    cause = (
        f"the gradient and a weight decay of {decay:g} balance each other"
        if decay
        else ("neither the data nor the head explains why")
    )
    return Finding(
        "held-by-decay" if decay else "resting-above-floor",
        "update",
        f"The loss has converged at {evidence.loss:.4f}, well above its floor of {floor:.4f}: {cause}.",
        (f"median of the last {len(tail)} losses {resting:.4f}, before {before:.4f}",),
        "use decoupled decay (AdamW), or weight_decay 0 for LoRA"
        if decay
        else "look for a decay that is added to the gradient (L2 in place of AdamW's), a low rank, or dropout",
        0.7 if decay else 0.6,
    )


def _base(evidence: Evidence) -> str:
    return "unknown" if evidence.first_loss.base is None else f"{evidence.first_loss.base:.4f}"
