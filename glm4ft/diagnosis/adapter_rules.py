"""Rules about what was saved: missing adapters, adapters without effect, another model, rows never learnt, decay."""

from __future__ import annotations

import math
import statistics

from glm4ft.diagnosis.curve import LEAST_STEPS
from glm4ft.diagnosis.curve_rules import LEARNT_LOSS
from glm4ft.diagnosis.evidence import Evidence
from glm4ft.diagnosis.finding import Finding

# A row is learnt below the first mean loss, and not learnt above the second; clean runs have all rows on one side.
ROW_LEARNT, ROW_NOT_LEARNT = 0.1, 0.5
# The saved model differs from the logged one if the log's last loss is less than a quarter of the measured one. On
# clean runs the two differ by one step's progress, a factor of 1.04 at a loss of 0.002 on the built-in base; the median
# of the last logged losses evens out the batches.
LOGGED_SHARE, DIFFERENT_LOSS = 0.25, 0.02
LAST_SHARE = 12  # the last logged losses are the last twelfth


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


def reload_differs(evidence: Evidence) -> Finding | None:
    """The saved adapter on its base has a much larger loss than the run logged."""
    losses = evidence.losses
    measured = [token.loss for token in evidence.supervised if not math.isnan(token.loss)]
    if not losses or not measured:
        return None
    now, logged = statistics.fmean(measured), statistics.median(losses[-max(1, len(losses) // LAST_SHARE) :])
    if not now > DIFFERENT_LOSS or not logged < LOGGED_SHARE * now:
        return None
    facts = (f"last logged loss {logged:.4f}, measured loss of the supervised tokens {now:.4f}", _start(evidence))
    if _is_only_padded(evidence):
        return Finding(
            "rows-depend-on-their-batch",
            "batches",
            "The longest row was learnt, but the shorter ones were not, although the log shows a low loss: in a batch, "
            "padding or neighbours change what the model sees of a row.",
            facts,
            "mask padding by length, restart positions at each row, and compare each row's loss alone and in its batch",
            0.9,
        )
    return Finding(
        "reload-differs",
        "model",
        f"The log and the saved {'weights' if evidence.adapters is None else 'adapter on its base'} disagree: what was "
        "trained is not what was saved, or was trained on other rows, or on "
        "a base that computes something else.",
        facts,
        "compare logits of the model in training with those of base and adapter in plain transformers and peft: the "
        "base's configuration (rotary embedding, norms), the adapter's scale (alpha / rank), the names of its tensors",
        0.9,
    )


def _is_only_padded(evidence: Evidence) -> bool:
    longest = max(row.length for row in evidence.rows)
    shorter = [row.loss for row in evidence.rows if row.length < longest and not math.isnan(row.loss)]
    full = [row.loss for row in evidence.rows if row.length == longest]
    return bool(shorter) and max(full) < DIFFERENT_LOSS < statistics.median(shorter)


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
    losses = evidence.losses
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


def _start(evidence: Evidence) -> str:
    first = evidence.first_loss
    base = math.nan if first.base is None else first.base
    logged = math.nan if first.logged is None else first.logged
    return f"the run began at {logged:.4f}, the base itself has {base:.4f}"
