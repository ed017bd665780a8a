"""Judges the gradient of a recorded step: the loss that it comes from, and its accumulation over micro-batches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.recording.trace import Tensors
from glm4ft.testing.replay.comparison import count_targets, dot, relative
from glm4ft.testing.replay.departure import Departures
from glm4ft.testing.replay.rounding import MARGIN
from glm4ft.testing.replay.seen_row import SeenRow
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.replay.tolerances import EXPLAINED, WEIGHT_LIMITS, within
from glm4ft.testing.specification.other_losses import name_loss
from glm4ft.testing.specification.reference import LabelledIds

# The smallest cosine between the gradient at the final norm and that of cross entropy with the best-fitting label; with
# a smaller one, the loss is not cross entropy.
FIT_LIMITS = {torch.float32: 0.999, torch.bfloat16: 0.98}
# An error is told as that of rounded logits if rounding them leaves at most this part of it. Where it is the cause, a
# fraction is left, of logits that other last digits round the other way.
CLEARER = 4
UNASKED_WEIGHTS = "the tokens of a row have weights that were not asked for"
NAMED_BY = 4  # the number of tokens by which another loss is named: one number is fitted to the D of each
# Judges that compare nothing once the gradient is not finite.
AFTER_THE_LOSS = ("gradient", "clipping", "update")


def judge_loss(step: ReplayedStep) -> Departures:
    """Report a loss that is not the cross entropy of the next tokens, or that weights the tokens of a step unequally.

    Labels and weights are recovered at the recorded hidden states, whatever model computed them.
    """
    if not step.has_finite_loss:
        yield step.depart("gradient", "the loss's gradient at the final norm is not finite", hides=AFTER_THE_LOSS)
        return
    for row in step.seen:
        yield from _wrong_loss(step, row)
    if not step.has_unstated_weights:
        yield from _wrong_weights(step)


def judge_gradient(step: ReplayedStep) -> Departures:
    """Report an accumulated gradient that is not that of the token mean over the whole step."""
    lost = [name for name, tensor in step.raw.items() if not bool(torch.isfinite(tensor).all())]
    if lost:
        text = f"the accumulated gradient is not finite in {len(lost)} of {len(step.raw)} parameters, e.g. {lost[0]}"
        yield step.depart("gradient", text, hides=AFTER_THE_LOSS[1:])
        return
    if step.has_unstated_weights:
        return
    expected = step.gradient()
    size = max(relative(step.raw, expected), step.norms_off())
    if not size <= step.limit("gradient"):
        as_most = step.gradient(dtype=torch.float32)  # what the softmax of most trainers rounds to is no departure
        other = max(relative(step.raw, as_most), step.norms_off())
        expected, size = (as_most, other) if other < size else (expected, size)
    if not size <= step.limit("gradient"):  # limits are of the whole run, and rounding adds up unevenly over its steps
        step.own_limits["gradient"] = max(step.limit("gradient"), MARGIN * step.gradient_rounding)
    cause, factor = ("", None) if size <= step.limit("gradient") else _gradient_cause(step, expected)
    yield step.depart("gradient", f"the gradient is {size:.1e} off the token mean", cause, size, factor=factor)


def _wrong_loss(step: ReplayedStep, row: SeenRow) -> Departures:
    fit = float(row.targets.fit_T[1:].min())
    if not within("gradient: cosine to cross entropy, below 1", 1 - fit, 1 - FIT_LIMITS[step.history.dtype]):
        text = f"the gradient at the final norm is not that of cross entropy with one label (cosine {fit:.4f})"
        yield step.depart("gradient", text, _loss_cause(step, row), hides=("gradient",))
    ids, expected, got = torch.tensor(row.ids), torch.tensor(step.labels_of(row.ids)), row.targets.labels_T
    trained = ((got != IGNORED)[1:].nonzero()[:, 0] + 1).tolist()  # what is before a row may predict its first token
    if sum(bool(got[t] != ids[t]) for t in trained) > len(trained) // 2:
        following = sum(t + 1 < len(ids) and bool(got[t] == ids[t + 1]) for t in trained)
        before = sum(t > 0 and bool(got[t] == ids[t - 1]) for t in trained)
        cause = ""
        if following > max(before, len(trained) // 2):
            cause = "labels are shifted twice: each position learns the token after next"
        elif before > len(trained) // 2:
            cause = "labels are not shifted: each position learns its own token"
        text = "the trained labels are not the next tokens"
        yield step.depart("gradient", text, cause, hides=("gradient",))
        return
    odd = [t for t in trained if expected[t] == IGNORED and got[t] != ids[t]]
    if odd and len({int(got[t]) for t in odd}) == 1:
        text = f"{len(odd)} positions that are not supervised are trained as class {int(got[odd[0]])}"
        yield step.depart("gradient", text, "the ignored label reaches the loss as a class", hides=("gradient",))


def _loss_cause(step: ReplayedStep, row: SeenRow) -> str:
    """The other loss that gives the gradient at the final norm of the run's first wrong row; "" if none is known."""
    if step.history.loss_name is not None:
        return step.history.loss_name
    gradient_BTD = step.step.forwards[row.forward].gradient_BTD
    assert gradient_BTD is not None
    labels_T, gradient_TD = torch.tensor(step.labels_of(row.ids)), gradient_BTD[row.span.b][row.span.positions]
    at_N = (labels_T[1 : len(gradient_TD)] != IGNORED).nonzero()[:NAMED_BY, 0]
    weight_VD, limit = step.reference.head_weight(step.step.weights), max(EXPLAINED, step.limit("gradient"))
    name = name_loss(row.hidden_TD[at_N], gradient_TD[at_N], labels_T[at_N + 1], weight_VD, limit)
    step.history.loss_name = name
    return name


def _wrong_weights(step: ReplayedStep) -> Departures:
    """Report tokens whose weight in the loss is not that in the mean over the step's supervised tokens."""
    limit, ratios = WEIGHT_LIMITS[step.history.dtype], dict[int, list[float]]()
    whole = step.divisor() / step.loss_factor.scale
    for row in step.seen:
        ratios.setdefault(row.forward, []).extend(share * whole for share in step.shares(row))
    if step.mean_weights(step.rows()) and any(_spread(values) > limit for values in ratios.values()):
        return  # stated weights that are applied in another way: the gradient tells in which
    # the weight of a confidently predicted token is a quotient of two small numbers and so imprecise; the median is not
    medians = {index: sorted(values)[len(values) // 2] for index, values in ratios.items() if values}
    low, high = min(medians.values(), default=1.0), max(medians.values(), default=1.0)
    if within("gradient: weight of a token", max(abs(low - 1), abs(high - 1)), limit):
        odd = step.odd_tokens[:1] if step.history.dtype == torch.float32 else []  # rounding weighs tokens, too
        for row, at, times in odd:
            token = f"{step.reference.show([row.ids[at]])} at position {at}"
            text = f"{token} counts {times:.3g} times as much as most tokens of its row"
            yield step.depart("gradient", text, _chunk_cause(step, limit) or UNASKED_WEIGHTS, hides=("gradient",))
        return
    if high - low <= limit * high:
        text = f"tokens count {low:.4g} to {high:.4g} times what they should"
        as_factor = f"the loss is {high:.4g} times the token mean{_factor_words(step, high)}"
        cause = as_factor if _is_multiple(step) else _chunk_cause(step, limit)
        cause = cause or UNASKED_WEIGHTS * bool(step.odd_tokens)
        yield step.depart("gradient", text, cause, factor=high, hides=("gradient",))
        return
    text = f"tokens count {low:.4g} to {high:.4g} times what they should"
    yield step.depart("gradient", text, _uneven_cause(step, medians, limit), hides=("gradient",))


def _is_multiple(step: ReplayedStep) -> bool:
    """Whether the accumulated gradient is a multiple of the right one, which only a factor on the whole loss gives."""
    expected = step.gradient()
    factor = dot(step.raw, expected) / (dot(expected, expected) or 1.0)
    rounding = max(EXPLAINED, step.limit("gradient"))
    return relative(step.raw, {name: factor * g for name, g in expected.items()}) <= rounding


def _chunk_cause(step: ReplayedStep, limit: float) -> str:
    """The position where a row's tokens begin to count otherwise, if each part counts as a mean of its own; else ""."""
    for row in step.seen:
        at_N = (row.targets.labels_T != IGNORED).nonzero()[:, 0]
        weights_N = row.targets.weights_T[at_N]
        starts = ((weights_N[1:] / weights_N[:-1] - 1).abs() > 10 * limit).nonzero()[:, 0] + 1
        chunks = weights_N.tensor_split(starts.tolist())
        sums = [float(chunk.sum()) for chunk in chunks]
        if len(chunks) > 1 and max(sums) - min(sums) <= limit * max(sums) and min(map(len, chunks)) > 1:
            return f"means over chunks of positions are added, a second one from position {int(at_N[starts[0]])} on"
    return ""


def _spread(values: list[float]) -> float:
    """The distance of the quartiles of numbers, relative to the upper one."""
    ordered = sorted(values)
    low, high = (ordered[len(ordered) * part // 4] for part in (1, 3)) if ordered else (1.0, 1.0)
    return (high - low) / high if high else 0.0


def _uneven_cause(step: ReplayedStep, medians: Mapping[int, float], limit: float) -> str:
    """The mean that weights tokens as they are: one over the targets of a micro-batch, a process or a row, each."""
    causes = (_mean_cause(step, medians, limit, sum_of) for sum_of in (step.weight, count_targets))
    return next((cause for cause in causes if cause), "")


def _mean_cause(
    step: ReplayedStep, medians: Mapping[int, float], limit: float, sum_of: Callable[[list[LabelledIds]], float]
) -> str:
    targets = {forward: sum_of(step.rows(forward)) for forward in medians}
    processes = step.history.plan.get("processes", 1)
    share = max(1, -(-len(step.step.forwards) // processes))  # forward passes of one process
    of_process = {forward: sum(n for f, n in targets.items() if f // share == forward // share) for forward in medians}
    candidates = {
        "a mean of micro-batch means: tokens of short micro-batches weigh more": targets,
        "a mean over processes of their own means: tokens of processes with few targets weigh more": of_process,
    }
    if processes > 1 and targets == of_process:  # with one micro-batch each, the mean over processes is the one meant
        del candidates[next(iter(candidates))]
    found = []
    for words, counts in candidates.items():
        products = [medians[forward] * counts[forward] for forward in medians]
        if max(products) - min(products) <= limit * max(products) and len(set(counts.values())) > 1:
            found.append(words)
    if found:
        return found[0] if len(found) == 1 or processes == 1 else ""
    by_row = [statistics.median_low(shares) * sum_of([(row.ids, step.labels_of(row.ids))])
              for row in step.seen if (shares := step.shares(row))]  # fmt: skip
    is_by_row = bool(by_row) and max(by_row) - min(by_row) <= 10 * limit * max(by_row)
    return "a mean of the rows' own means: tokens of short rows weigh more" if is_by_row else ""


def _factor_words(step: ReplayedStep, factor: float) -> str:
    """The divisor that explains a factor on the loss; "" if none fits or several do."""
    divisors = {
        "all tokens, supervised or not": sum(len(row.ids) for row in step.seen),
        "all positions, padding included": sum(f.input_ids_BT.numel() for f in step.step.forwards),
        "all predicted positions": sum(f.input_ids_BT[:, 1:].numel() for f in step.step.forwards),
    }
    factors = {f": divided by the number of {of}": step.num_targets / max(1, n) for of, n in divisors.items()}
    for name, words in (("accumulation", "micro-batches"), ("processes", "processes")):
        count = step.history.plan.get(name, 1)
        if count > 1:
            factors[f": not divided by the number of {words}"] = count
            factors[f": divided by the number of {words} twice"] = 1 / count
    fitting = [words for words, f in factors.items() if abs(factor / f - 1) <= WEIGHT_LIMITS[torch.float32]]
    return fitting[0] if len(fitting) == 1 else ""


def _gradient_cause(step: ReplayedStep, expected: Tensors) -> tuple[str, float | None]:
    """Explain a wrong gradient as a weighted sum of the micro-batches' gradients and that of the previous step.

    Returns:
        The cause, "" if none is found; and the factor on the whole gradient, None unless that is the cause.
    """
    raw, previous = step.raw, step.history.previous
    if raw.keys() != expected.keys():
        return f"no gradient was accumulated in {sorted(expected.keys() - raw.keys())[:1]}", None
    if cause := _weights_cause(step):
        return cause, None
    parts = _parts(step)
    if previous:
        parts.append(previous.clipped)
    gram = torch.tensor([[dot(a, b) for b in parts] for a in parts], dtype=torch.float64)
    if not bool(gram.isfinite().all()):
        return "the specification's own gradient is not finite at these parameters", None
    factors = torch.linalg.lstsq(gram, torch.tensor([dot(a, raw) for a in parts], dtype=torch.float64)).solution
    explained = {n: sum(float(f) * part[n].double() for f, part in zip(factors, parts, strict=True)) for n in raw}
    rounding = max(EXPLAINED, step.limit("gradient"))
    if relative(raw, explained) > rounding:  # type: ignore[arg-type]
        return _gradient_of_some(step, expected), None
    if previous and abs(factors[-1]) > 0.1:
        return "the gradient of the previous step was not cleared", None
    return _counts(factors[: len(_forwards(step))].tolist(), 10 * rounding)


def _weights_cause(step: ReplayedStep) -> str:
    """The one other way to apply the stated weights of tokens that gives the recorded gradient, up to a factor."""
    rows, kept, found = step.rows(), [step.kept(row) for row in step.seen], list[str]()
    if not step.mean_weights(rows):
        return ""
    own = [step.token_weights(ids) for ids, _ in rows]
    before = [torch.tensor(step.history.known.weights[ids], dtype=torch.float64).roll(1) for ids, _ in rows]
    ways = {
        "the weights of tokens are not applied": [(w > 0).double() for w in own],
        "each token has the weight of the one before it: labels are shifted, weights are not": before,
        "the weights of tokens are applied twice": [w * w for w in own],
    }
    for words, weights in ways.items():
        told = step.sampled(step.reference.gradient(rows, step.step.weights, kept, weights))
        factor = dot(step.raw, told) / (dot(told, told) or 1.0)
        if relative(step.raw, {name: factor * g for name, g in told.items()}) <= step.limit("gradient"):
            found.append(words)
    return found[0] if len(found) == 1 else ""


def _gradient_of_some(step: ReplayedStep, expected: Tensors) -> str:
    """Explain a gradient that is correct except for a factor on some parameters, or for logits in low precision."""
    raw = step.raw
    own = {name: float((raw[name] * g).sum() / (g * g).sum()) for name, g in expected.items() if g.any()}
    scaled = {name: own.get(name, 1.0) * g for name, g in expected.items()}
    odd = [name for name, factor in own.items() if abs(factor - 1) > 0.1]
    if odd and relative(raw, scaled) <= EXPLAINED:
        return f"{len(odd)} parameters have {own[odd[0]]:.4g} times their gradient, e.g. {odd[0]}"
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        if relative(raw, step.gradient(dtype=dtype)) <= relative(raw, expected) / CLEARER:
            return f"the logits are rounded to {name}, in which the loss is computed"
    return ""


def _forwards(step: ReplayedStep) -> list[int]:
    """The indices of the forward passes that contain targets."""
    return sorted({row.forward for row in step.seen if any(label >= 0 for label in step.labels_of(row.ids))})


def _parts(step: ReplayedStep) -> list[Tensors]:
    """The gradient that each micro-batch with targets should contribute to the step's."""
    parts = []
    for forward in _forwards(step):
        rows = step.rows(forward)
        share = step.divisor(rows) / step.divisor()
        parts.append({n: share * g for n, g in step.gradient(forward).items()})
    return parts


def _counts(factors: list[float], rounding: float) -> tuple[str, float | None]:
    """The weight of each micro-batch in words; and the common factor, None if the weights differ by more."""
    mean = sum(factors) / len(factors)
    if max(abs(f - mean) for f in factors) <= rounding * abs(mean):
        if abs(mean - 1) <= EXPLAINED:
            return "", None  # each micro-batch counts once: what is off is within them
        return f"it is {mean:.4g} times the token mean", mean
    lost = [str(i) for i, f in enumerate(factors, start=1) if abs(f) < 0.1]
    if lost:
        return f"{len(lost)} of {len(factors)} micro-batches lost: number {', '.join(lost)}", None
    return "micro-batches count " + ", ".join(f"{f:.3g}" for f in factors) + " times", None
