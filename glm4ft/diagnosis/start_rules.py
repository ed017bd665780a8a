"""Rules about the first loss, which depends on base, tokens and normalisation alone: nothing was learnt yet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from glm4ft.diagnosis.curve import interval
from glm4ft.diagnosis.evidence import Evidence
from glm4ft.diagnosis.finding import Finding

# Largest relative difference between the first logged loss, of one batch, and the base's over all rows: on the two
# conversations of the demo, a batch of one differs by 6 % at most (4 seeds of the built-in base, x86-64 CPU,
# 2026-11-25).
START_DIFFERENCE = 0.3
# The same if the first step saw all rows: fresh adapters have no effect, so the two losses are equal but for rounding,
# since the run may have been in bf16 and the base is measured in fp32. On real weights (SmolLM2, short answers) they
# differ by 4.0 % at most on one row, 2.9 % on two and 2.4 % on four; on the built-in base by 0.04 % (all sets of 16
# rows, x86-64 CPU, 2026-11-27).
WHOLE_START_DIFFERENCE = 0.05
# A first loss above this multiple of ln V is no mean over tokens of a sound model. Random weights have about ln V. The
# built-in base, whose head is sharp and which knows nothing, has 1.4 times that.
IMPOSSIBLE = 1.5
# Where the vocabulary is not known: the largest in common use (Gemma, 262,144 tokens).
LARGEST_VOCABULARY = 262_144
# Nats that no pretrained model has on text it can read: a perplexity of 3,000.
UNREAD_TEXT = 8.0
# From two evaluations on, the ratio of training to evaluation loss is compared with whole numbers.
LEAST_EVALUATIONS = 2
# A ratio is that of the options if it is as near as this to it, relative: batches differ. Otherwise it has to be a
# whole number; a large one has to be a power of two, since others cannot be told apart.
NEAR_KNOWN, NEAR, SMALL = 0.15, 0.03, 8
SPREAD = 1.06  # of the ratios to evaluations, largest over smallest: those of an over-fitting run drift apart


def loss_not_a_mean(evidence: Evidence) -> Finding | None:
    """The logged loss is a whole multiple of the true one, or a whole fraction of it."""
    found = _ratio(evidence)
    if found is None:
        return None
    ratio, spread, to_what = found
    times, is_sum = max(ratio, 1 / ratio), ratio > 1
    # held-out conversations are never many times easier than those that are trained
    number, name = _factor(times, evidence.options, NEAR if to_what == "base" else NEAR_KNOWN)
    # without the weights that were trained, a ratio to a base may be one to another run's
    is_sure = bool(name) or (is_sum and spread < SPREAD and (evidence.adapters is not None or to_what != "base"))
    if number < 2 or not is_sure:
        return None
    what = f"{times:.1f} times" if is_sum else f"1/{times:.1f} of"
    who = "the loss that the base itself has on these rows" if to_what == "base" else "the evaluations of the same run"
    cause = f", and {number} is {name}" if name else f", and {number} is what gradient_accumulation_steps may be"
    mistake = (
        "losses are summed over accumulation steps or processes where a mean over all their tokens is due, and the "
        "gradients are as much too large."
        if is_sum
        else "losses are divided by the accumulation steps or processes twice."
    )
    return Finding(
        "loss-not-a-mean",
        "gradient",
        f"The logged loss is {what} {who}{cause}: {mistake}",
        (_facts(evidence), f"ratio {ratio:.4g}"),
        "divide the summed loss of all micro-batches and processes once, by their number of supervised tokens; with "
        "transformers, a model whose forward takes num_items_in_batch must use it (transformers 34263)",
        0.95 if name else 0.9,
    )


def wrong_start(evidence: Evidence) -> Finding | None:
    """The first loss is not that of the base, or of any model that can read."""
    first, curve = evidence.first_loss, evidence.curve
    if first.logged is None or not math.isfinite(first.logged) or not curve or not _is_beginning(evidence):
        return None
    uniform = first.uniform or math.log(LARGEST_VOCABULARY)
    far = first.logged > IMPOSSIBLE * uniform
    if far or (first.base is None and uniform > UNREAD_TEXT and first.logged > UNREAD_TEXT):
        return _unreadable(evidence, uniform, is_far=far)
    # without the weights that were trained it is not sure that this is the run's base
    if first.base is None or evidence.adapters is None or curve[0].step != 1:
        return None
    # the base's loss is known for the measured rows only, and the first step of a large data set saw others
    is_whole = evidence.is_whole and int(evidence.options.get("rows_per_step") or 0) >= len(evidence.rows)
    limit = WHOLE_START_DIFFERENCE if is_whole else START_DIFFERENCE
    if not evidence.is_whole or not abs(first.logged / first.base - 1) > limit:
        return None
    return Finding(
        "wrong-start",
        "model",
        f"Training began at a loss of {first.logged:.4g}, but the base itself has {first.base:.4g} on these rows: the "
        "trained model is not the base, or the trained tokens are not these.",
        (f"the first step saw {'all' if is_whole else 'some of the'} rows", _facts(evidence)),
        "compare logits of the wrapped model before training with those of plain transformers on the same rows",
        0.9 if is_whole else 0.6,
    )


def _unreadable(evidence: Evidence, uniform: float, *, is_far: bool) -> Finding:
    first = evidence.first_loss
    logged = first.logged or 0.0
    known = "ln V" if first.uniform else f"ln {LARGEST_VOCABULARY:,}, for the largest vocabulary in common use,"
    text = (
        f"Training began at a loss of {logged:.4g}, {logged / uniform:.1f} times {known} = {uniform:.2f}, which a "
        "model that knows nothing has: this is no mean over tokens. Either losses are summed over accumulation steps "
        "or processes (gradient_accumulation_steps, world size), or the weights are not those of the base."
        if is_far
        else f"Training began at a loss of {logged:.4g}; a pretrained model has less than {UNREAD_TEXT:g} on any text "
        f"that it can read, and one that knows nothing {known} = {uniform:.2f}. Weights were not loaded, the tokenizer "
        "is another model's, or the loss is a sum."
    )
    return Finding(
        "wrong-start",
        "gradient" if is_far else "model",
        text,
        (_facts(evidence),),
        "run once without accumulation on one process: if the first loss falls by their number, it is a sum; if not, "
        "compare logits of the model before training with those of plain transformers on the same rows",
        0.9,
    )


def _ratio(evidence: Evidence) -> tuple[float, float, str] | None:
    """The ratio of the logged loss to the base's at the start, or to the evaluations beside it, and its spread."""
    first = evidence.first_loss
    beside = _beside_evaluations(evidence)
    if len(beside) >= LEAST_EVALUATIONS:
        return statistics.median(beside), max(beside) / min(beside), "evaluations"
    is_known = first.base is not None and first.base > 0 and first.logged is not None and first.logged > 0
    if is_known and _is_beginning(evidence) and evidence.curve[0].step == 1:
        return (first.logged or 0.0) / (first.base or 1.0), 1.0, "base"
    return None


def _beside_evaluations(evidence: Evidence) -> list[float]:
    """Training loss at each evaluation over the evaluation's; means over a few points, since batches differ."""
    ratios = []
    for evaluation in evidence.evaluations:
        near = [
            p.loss for p in evidence.curve if p.loss and abs(p.step - evaluation.step) <= 2 * interval(evidence.curve)
        ]
        if near and math.isfinite(evaluation.loss) and evaluation.loss > 0 and all(map(math.isfinite, near)):
            ratios.append(statistics.fmean(near) / evaluation.loss)
    return ratios


def _is_beginning(evidence: Evidence) -> bool:
    """Whether the log begins where the run does; the log of a resumed run begins at a later step."""
    return evidence.curve[0].step <= interval(evidence.curve)


def _factor(times: float, options: Mapping[str, object], near: float) -> tuple[int, str]:
    """The whole number that a ratio is, with its name where the options have it; 0 if it is none."""
    accumulation, processes = (int(float(str(options.get(name) or 1))) for name in ("accumulation", "world_size"))
    names = {
        accumulation * processes: f"accumulation steps times processes ({accumulation} x {processes})",
        processes: f"the world size ({processes})",
        accumulation: f"the number of accumulation steps ({accumulation})",
    }
    for number, name in names.items():
        if number > 1 and abs(times / number - 1) <= NEAR_KNOWN:
            return number, name
    number = round(times) if times < SMALL else 2 ** round(math.log2(times))
    return (number, "") if number > 1 and abs(times / number - 1) <= near else (0, "")


def _facts(evidence: Evidence) -> str:
    first = evidence.first_loss
    parts = [f"first logged loss {first.logged:.4g}" if first.logged is not None else ""]
    parts.append(f"the base's own {first.base:.4g}" if first.base is not None else "")
    parts.append(f"ln V, that of a model that knows nothing, {first.uniform:.2f}" if first.uniform else "")
    return ", ".join(filter(None, parts))
