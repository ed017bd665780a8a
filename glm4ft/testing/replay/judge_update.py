"""Judges what follows from the gradient of a recorded step: the learning rate and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from glm4ft.testing.recording.trace import Tensors
from glm4ft.testing.replay.departure import Departures
from glm4ft.testing.replay.step import ReplayedStep, relative
from glm4ft.testing.replay.tolerances import EXPLAINED
from glm4ft.testing.specification.update_rule import scheduled_rate, warmups_above_zero


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
        if factor > 1 and (period := steps // factor):
            found[f"the schedule starts again after {period} steps"] = rates(_cyclic(period), total=period)
    distinct = dict[tuple[float, ...], str]()
    for words, predicted in found.items():
        if not _equal(predicted, rates(), plan):
            distinct.setdefault(tuple(predicted), words)  # equal predictions are one mistake under two names
    return {words: list(predicted) for predicted, words in distinct.items()}


def _times(factor: int) -> Callable[[int], int]:
    return lambda n: (n - 1) * factor + 1


def _cyclic(period: int) -> Callable[[int], int]:
    return lambda n: (n - 1) % period + 1


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
