"""Judges the results of a recorded step: the gradient, its clipping, the learning rate and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from glm4ft.data.chat_format import IGNORED
from glm4ft.testing.recording.trace import Tensors
from glm4ft.testing.replay.step import WEIGHT_LIMITS, Departures, ReplayedStep, SeenRow, count_targets, dot, relative
from glm4ft.testing.replay.tolerances import within
from glm4ft.testing.specification.reference import clip_factor, scheduled_rate, warmups_above_zero

# The smallest cosine between the gradient at the final norm and that of cross entropy with the best-fitting label; with
# a smaller one, the loss is not cross entropy.
FIT_LIMITS = {torch.float32: 0.999, torch.bfloat16: 0.98}
# The largest relative error that bf16 rounding explains: half an ulp is 2^-9 of a value, and a mean over tokens is off
# by less.
BF16_NOISE = 2.0**-8
# The largest residual, relative to a wrong gradient, with which a cause counts as its explanation.
EXPLAINED = 1e-3
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
    yield from _wrong_weights(step)


def judge_gradient(step: ReplayedStep) -> Departures:
    """Report an accumulated gradient that is not that of the token mean over the whole step."""
    lost = [name for name, tensor in step.raw.items() if not bool(torch.isfinite(tensor).all())]
    if lost:
        text = f"the accumulated gradient is not finite in {len(lost)} of {len(step.raw)} parameters, e.g. {lost[0]}"
        yield step.depart("gradient", text, hides=AFTER_THE_LOSS[1:])
        return
    expected = step.reference.gradient(step.rows(), step.step.before)
    size = relative(step.raw, expected)
    cause, factor = ("", None) if size <= step.history.limit else _gradient_cause(step, expected)
    yield step.depart("gradient", f"the gradient is {size:.1e} off the token mean", cause, size, factor=factor)


def _wrong_loss(step: ReplayedStep, row: SeenRow) -> Departures:
    fit = float(row.targets.fit_T[1:].min())
    if not within("gradient: cosine to cross entropy, below 1", 1 - fit, 1 - FIT_LIMITS[step.history.dtype]):
        text = f"the gradient at the final norm is not that of cross entropy with one label (cosine {fit:.4f})"
        yield step.depart("gradient", text, "label smoothing, or another term in the loss", hides=("gradient",))
    ids, expected, got = torch.tensor(row.ids), torch.tensor(step.labels_of(row.ids)), row.targets.labels_T
    trained = (got != IGNORED).nonzero()[:, 0].tolist()
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
    odd = [t for t in trained if t and expected[t] == IGNORED and got[t] != ids[t]]
    if odd and len({int(got[t]) for t in odd}) == 1:
        text = f"{len(odd)} positions that are not supervised are trained as class {int(got[odd[0]])}"
        yield step.depart("gradient", text, "the ignored label reaches the loss as a class", hides=("gradient",))


def _wrong_weights(step: ReplayedStep) -> Departures:
    """Report tokens whose weight in the loss is not one over the number of the step's supervised tokens."""
    limit, ratios = WEIGHT_LIMITS[step.history.dtype], dict[int, list[float]]()
    for row in step.seen:
        heavy = row.targets.weights_T[row.targets.labels_T != IGNORED] * step.num_targets / step.loss_scale
        ratios.setdefault(row.forward, []).extend(heavy.tolist())
    # the weight of a confidently predicted token is a quotient of two small numbers and so imprecise; the median is not
    medians = {index: sorted(values)[len(values) // 2] for index, values in ratios.items() if values}
    low, high = min(medians.values(), default=1.0), max(medians.values(), default=1.0)
    if within("gradient: weight of a token", max(abs(low - 1), abs(high - 1)), limit):
        return
    if high - low <= limit * high:
        cause = f"the loss is {high:.4g} times the token mean" + _factor_words(step, high)
        text = f"tokens count {low:.4g} to {high:.4g} times what they should"
        yield step.depart("gradient", text, cause, factor=high, hides=("gradient",))
        return
    text = f"tokens count {low:.4g} to {high:.4g} times what they should"
    yield step.depart("gradient", text, _uneven_cause(step, medians, limit), hides=("gradient",))


def _uneven_cause(step: ReplayedStep, medians: Mapping[int, float], limit: float) -> str:
    """The mean that weights tokens as they are: one over the targets of a micro-batch, a process or a row, each."""
    targets = {forward: count_targets(step.rows(forward)) for forward in medians}
    processes = step.history.plan.get("processes", 1)
    share = max(1, -(-len(step.step.forwards) // processes))  # forward passes of one process
    of_process = {forward: sum(n for f, n in targets.items() if f // share == forward // share) for forward in medians}
    found = []
    for words, counts in (
        ("a mean of micro-batch means: tokens of short micro-batches weigh more", targets),
        ("a mean over processes of their own means: tokens of processes with few targets weigh more", of_process),
    ):
        products = [medians[forward] * counts[forward] for forward in medians]
        if max(products) - min(products) <= limit * max(products) and len(set(counts.values())) > 1:
            found.append(words)
    if found:
        return found[0] if len(found) == 1 or processes == 1 else ""
    by_row = [float(row.targets.weights_T[row.targets.labels_T != IGNORED].median()) * count_targets([(row.ids,
              step.labels_of(row.ids))]) for row in step.seen if (row.targets.labels_T != IGNORED).any()]  # fmt: skip
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
    parts = _parts(step)
    if previous:
        parts.append(previous.clipped)
    gram = torch.tensor([[dot(a, b) for b in parts] for a in parts], dtype=torch.float64)
    factors = torch.linalg.lstsq(gram, torch.tensor([dot(a, raw) for a in parts], dtype=torch.float64)).solution
    explained = {n: sum(float(f) * part[n].double() for f, part in zip(factors, parts, strict=True)) for n in raw}
    if relative(raw, explained) > EXPLAINED:  # type: ignore[arg-type]
        return _gradient_of_some(raw, expected), None
    if previous and abs(factors[-1]) > 0.1:
        return "the gradient of the previous step was not cleared", None
    return _counts(factors[: len(_forwards(step))].tolist())


def _gradient_of_some(raw: Tensors, expected: Tensors) -> str:
    """Explain a gradient that is correct except for a factor on some parameters, or except for bf16 rounding."""
    own = {name: float((raw[name] * g).sum() / (g * g).sum()) for name, g in expected.items() if g.any()}
    scaled = {name: own.get(name, 1.0) * g for name, g in expected.items()}
    odd = [name for name, factor in own.items() if abs(factor - 1) > 0.1]
    if odd and relative(raw, scaled) <= EXPLAINED:
        return f"{len(odd)} parameters have {own[odd[0]]:.4g} times their gradient, e.g. {odd[0]}"
    if not odd and relative(raw, expected) <= BF16_NOISE:
        return "the error has the size of bf16 rounding: the loss is computed in low precision"
    return ""


def _forwards(step: ReplayedStep) -> list[int]:
    """The indices of the forward passes that contain targets."""
    return sorted({row.forward for row in step.seen if any(label >= 0 for label in step.labels_of(row.ids))})


def _parts(step: ReplayedStep) -> list[Tensors]:
    """The gradient that each micro-batch with targets should contribute to the step's."""
    parts = []
    for forward in _forwards(step):
        rows = step.rows(forward)
        share = sum(label != IGNORED for _, labels in rows for label in labels) / step.num_targets
        parts.append({n: share * g for n, g in step.reference.gradient(rows, step.step.before).items()})
    return parts


def _counts(factors: list[float]) -> tuple[str, float | None]:
    """The weight of each micro-batch in words; and the common factor, None if the weights differ."""
    mean = sum(factors) / len(factors)
    if max(abs(f - mean) for f in factors) <= 10 * EXPLAINED * abs(mean):
        return f"it is {mean:.4g} times the token mean", mean
    lost = [str(i) for i, f in enumerate(factors, start=1) if abs(f) < 0.1]
    if lost:
        return f"{len(lost)} of {len(factors)} micro-batches lost: number {', '.join(lost)}", None
    return "micro-batches count " + ", ".join(f"{f:.3g}" for f in factors) + " times", None


def judge_clipping(step: ReplayedStep) -> Departures:
    """Report a gradient that is not scaled by the one factor that clipping to the global norm gives."""
    limit, raw, clipped = step.history.plan["max_grad_norm"], step.raw, step.step.clipped
    norm, factor = clip_factor(raw, limit)
    size = relative(clipped, {name: factor * tensor for name, tensor in raw.items()})
    got = dot(clipped, raw) / norm**2 if norm else factor  # a gradient of zero has no factor to be read off
    cause = "" if size <= step.limit("clipping") else _clipping_cause(step, norm, got)
    text = f"the gradient of norm {norm:.4g} was multiplied by {got:.4g}, not {factor:.4g}"
    yield step.depart("clipping", text, cause, size)


def _clipping_cause(step: ReplayedStep, norm: float, got: float) -> str:
    limit, raw, clipped = step.history.plan["max_grad_norm"], step.raw, step.step.clipped
    if raw.keys() != clipped.keys():
        return ""
    if relative(clipped, raw) <= 1e-6:
        return "it was not clipped"
    cosine = got * norm / math.sqrt(dot(clipped, clipped) or 1.0)
    if cosine >= 1 - 1e-6:
        if norm < limit and abs(got * norm / limit - 1) <= 1e-3:
            return "the coefficient is inverted: a small gradient is scaled up to the limit"
        scale = step.loss_scale
        if scale > 1 and abs(got * norm * scale / limit - 1) <= 1e-3:
            return f"it was clipped before the loss scale of {scale:g} was divided out"
        return "the factor is computed from a norm other than the global one"
    if _is_parallel(raw, clipped):
        return "each parameter or group is clipped by its own norm"
    return f"its direction changed (cosine {cosine:.4f}): clipped by value"


def _is_parallel(raw: Tensors, clipped: Tensors) -> bool:
    """Whether clipping kept the direction of each parameter's gradient."""
    for name, gradient in raw.items():
        a, b = gradient.double().flatten(), clipped[name].double().flatten()
        lengths = float(a.norm() * b.norm())
        if lengths and not float(a @ b) >= (1 - 1e-6) * lengths:
            return False
    return True


def judge_schedule(step: ReplayedStep) -> Departures:
    """Report a learning rate that differs from the schedule's closed form; a warm-up may start above zero."""
    plan = step.history.plan
    expected = _expected_rate(step)
    for group in step.step.groups:
        if group.size:
            got = float(group.settings["lr"])
            size = abs(got - expected) / plan["learning_rate"]
            cause = "" if size <= step.limit("schedule") else _rate_cause(step)
            yield step.depart("schedule", f"the learning rate is {got:.6g}, not {expected:.6g}", cause, size)


def _expected_rate(step: ReplayedStep) -> float:
    plan, rates = step.history.plan, step.history.rates
    for warmup in warmups_above_zero(plan):
        # what follows must be the schedule, or a run that is a step ahead throughout would pass for such a warm-up
        after = [scheduled_rate(n, plan, plan["steps"]) for n in range(len(warmup) + 1, len(rates) + 1)]
        if step.number <= len(warmup) and _equal(rates, [*warmup, *after], plan):
            return warmup[step.number - 1]
    return scheduled_rate(step.number, plan, plan["steps"])


def _equal(rates: Sequence[float], others: Sequence[float], plan: Mapping[str, Any]) -> bool:
    limit = 1e-6 * plan["learning_rate"]
    return all(abs(a - b) <= limit for a, b in zip(rates, others, strict=False))


def _rate_cause(step: ReplayedStep) -> str:
    """The one mistake that predicts the learning rates of all recorded steps; "" if none does, or several do."""
    plan, rates = step.history.plan, step.history.rates
    fitting = [words for words, predicted in _wrong_rates(plan, len(rates)).items() if _equal(rates, predicted, plan)]
    return fitting[0] if len(fitting) == 1 else ""


def _wrong_rates(plan: Mapping[str, Any], count: int) -> dict[str, list[float]]:
    """The learning rates that known mistakes give, by the mistake; those that the right schedule gives too left out."""
    steps, numbers = plan["steps"], range(1, count + 1)

    def rates(number: Callable[[int], int] = int, total: int = steps, **changes: Any) -> list[float]:
        return [scheduled_rate(min(max(number(n), 1), total + 1), {**plan, **changes}, total) for n in numbers]

    found = {f"the schedule has another shape than requested: {shape}": rates(schedule=shape)
             for shape in ("linear", "cosine")}  # fmt: skip
    found["there is no warm-up"] = rates(warmup_steps=0)
    found["the schedule is one step ahead"] = rates(lambda n: n + 1)
    found["the schedule is one step behind"] = rates(lambda n: n - 1)
    found["it does not change"] = [plan["learning_rate"]] * count
    found["it does not change after its warm-up"] = rates(schedule="constant")
    for factor in dict.fromkeys((plan["accumulation"], 2, 3, 4, 8)):
        if factor > 1:
            found[f"the schedule is stretched over {steps * factor} steps, not {steps}"] = rates(total=steps * factor)
            found[f"the schedule steps {factor} times per update"] = rates(_times(factor))
            found[f"the learning rate is {factor} times the requested one"] = [factor * rate for rate in rates()]
    distinct = dict[tuple[float, ...], str]()
    for words, predicted in found.items():
        if not _equal(predicted, rates(), plan):
            distinct.setdefault(tuple(predicted), words)  # equal predictions are one mistake under two names
    return {words: list(predicted) for predicted, words in distinct.items()}


def _times(factor: int) -> Callable[[int], int]:
    return lambda n: (n - 1) * factor + 1


def judge_update(step: ReplayedStep) -> Departures:
    """Report an update other than AdamW's, and parameters that are not optimized or change between two steps."""
    recorded, previous = step.step, step.history.previous
    if previous:
        moved = [name for name, after in previous.after.items() if not torch.equal(after, recorded.before[name])]
        if moved:
            is_bf16 = all(torch.equal(t, t.bfloat16().to(t.dtype)) for t in recorded.before.values())
            cause = "they are rounded to bfloat16, which loses small updates" if is_bf16 else ""
            text = f"{len(moved)} parameters changed between two steps, e.g. {moved[0]}"
            yield step.depart("update", text, cause)
    unused = sorted(set(recorded.before) - {name for group in recorded.groups for name in group.names})
    if unused:
        text = f"{len(unused)} trained parameters are not in the optimizer, e.g. {unused[0]}"
        # nobody clears their gradients either
        yield step.depart("update", text, hides_later=("gradient", "clipping"))
    rates = {float(group.settings["lr"]) for group in recorded.groups if group.size}
    empty = [group for group in recorded.groups if not group.size and float(group.settings["lr"]) not in rates]
    if empty:
        text = f"a parameter group with its own learning rate ({empty[0].settings['lr']:g}) holds no parameter"
        yield step.depart("update", text, "the name pattern that selects its parameters matches none")
    size = _update_size(step, next(iter(rates)))
    cause = "" if size <= step.limit("update") else _update_cause(step)
    yield step.depart("update", f"the update is {size:.1e} off AdamW's ({recorded.optimizer})", cause, size)


def _update_size(step: ReplayedStep, rate: float) -> float:
    recorded = step.step
    expected = step.history.optimizer.update(recorded.before, recorded.clipped, rate)
    moved = {name: expected[name] - recorded.before[name] for name in expected}
    got = {name: recorded.after[name].double() - recorded.before[name] for name in expected}
    # a parameter in fp32 cannot move by less than its own rounding
    rounding = math.sqrt(sum(float((t.double() * 2**-24).pow(2).sum()) for t in recorded.before.values()))
    off = math.sqrt(sum(float((got[n] - moved[n]).pow(2).sum()) for n in got))
    total = math.sqrt(sum(float(t.pow(2).sum()) for t in moved.values()))
    above = off - rounding
    return (0.0 if above < 0 else above) / total if total else off  # not max(), which would lose a NaN


def _update_cause(step: ReplayedStep) -> str:
    if step.step.optimizer != "AdamW":
        return f"the optimizer is {step.step.optimizer}"
    for name in ("weight_decay", "betas", "eps"):
        asked = step.history.plan[name]
        for group in step.step.groups:
            got = group.settings.get(name)
            if group.names and got is not None and not torch.equal(torch.tensor(got), torch.tensor(asked)):
                return f"{name} is {got}, not {asked}"
    return _variant_cause(step) if step.number == 1 else ""


def _variant_cause(step: ReplayedStep) -> str:
    """The one variant of AdamW that gives the first update; "" if none does, or several do."""
    plan, recorded = step.history.plan, step.step
    rate = next(float(group.settings["lr"]) for group in recorded.groups if group.size)
    (beta1, beta2), eps, decay = plan["betas"], plan["eps"], plan["weight_decay"]

    def moved(first: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
        return {n: -rate * (first(recorded.clipped[n].double()) + decay * recorded.before[n].double())
                for n in recorded.clipped}  # fmt: skip

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return t.bfloat16().double()

    m1, m2 = 1 - beta1, 1 - beta2
    variants = {
        "the moments are not corrected for their bias": moved(lambda g: m1 * g / ((m2 * g * g).sqrt() + eps)),
        "eps is added inside of the root": moved(lambda g: g / (g * g + eps).sqrt()),
        "the moments are kept in bfloat16": moved(
            lambda g: rounded(m1 * g) / m1 / ((rounded(m2 * g * g) / m2).sqrt() + eps)
        ),
        "the update is plain gradient descent": moved(lambda g: g),
    }
    got = {name: recorded.after[name].double() - recorded.before[name].double() for name in recorded.clipped}
    fitting = [words for words, expected in variants.items() if relative(got, expected) <= EXPLAINED]
    return fitting[0] if len(fitting) == 1 else ""
