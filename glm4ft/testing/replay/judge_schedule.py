"""Judges the learning rates of the recorded steps, group by group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from glm4ft.testing.recording.trace import ParameterGroup
from glm4ft.testing.replay.departure import Departures
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.specification.update_rule import scheduled_rate, warmups_above_zero


def judge_schedule(step: ReplayedStep) -> Departures:
    """Report a learning rate that differs from the schedule's closed form; a warm-up may start above zero.

    Each parameter learns at the schedule's rate times the factor that is stated for it.
    """
    history = step.history
    for number, group in enumerate(step.step.groups):
        for factor, names in _by_factor(step, group) if group.size else ():
            rates = [rate / factor for rate in history.rates(number)]
            got, expected = float(group.settings["lr"]), factor * _expected_rate(step, rates)
            size = abs(got - expected) / (factor * history.plan["learning_rate"])
            cause = "" if size <= step.limit("schedule") else _rate_cause(step, rates, factor)
            of = f" of {names[0]}" if history.factors and names else ""
            yield step.depart("schedule", f"the learning rate{of} is {got:.6g}, not {expected:.6g}", cause, size)


def _by_factor(step: ReplayedStep, group: ParameterGroup) -> Iterable[tuple[float, list[str]]]:
    """The parameters of a group by the factor of their rate; a group whose parameters are unknown has none."""
    found = dict[float, list[str]]()
    for name in group.names:
        found.setdefault(step.history.rate_factor(name), []).append(name)
    return (found or {1.0: []}).items()


def _expected_rate(step: ReplayedStep, rates: Sequence[float]) -> float:
    plan = step.history.plan
    for warmup in warmups_above_zero(plan):
        # what follows must be the schedule, or a run that is a step ahead throughout would pass for such a warm-up
        after = [scheduled_rate(n, plan, plan["steps"]) for n in range(len(warmup) + 1, len(rates) + 1)]
        if step.number <= len(warmup) and _equal(rates, [*warmup, *after], plan):
            return warmup[step.number - 1]
    return scheduled_rate(step.number, plan, plan["steps"])


def _equal(rates: Sequence[float], others: Sequence[float], plan: Mapping[str, Any]) -> bool:
    limit = 1e-6 * plan["learning_rate"]
    return all(abs(a - b) <= limit for a, b in zip(rates, others, strict=False))


def _rate_cause(step: ReplayedStep, rates: Sequence[float], factor: float) -> str:
    """The one mistake that predicts the learning rates of a group in all recorded steps; "" if none or several do.

    Args:
        step: The step.
        rates: The group's learning rate of each step, divided by the factor that was asked for.
        factor: The factor that was asked for.
    """
    plan = step.history.plan
    usual = [scheduled_rate(n, plan, plan["steps"]) for n in range(1, len(rates) + 1)]
    if factor != 1.0 and _equal(rates, [rate / factor for rate in usual], plan):
        others = [g.names[0] for i, g in enumerate(step.step.groups)
                  if g.names and _equal(step.history.rates(i), [factor * rate for rate in usual], plan)]  # fmt: skip
        where = f"applied to other parameters, as {others[0]}" if others else "not applied"
        return f"the factor {factor:g} that was asked for is {where}"
    for part, other in step.history.factors.items():
        if other != factor and _equal(rates, [rate * other / factor for rate in usual], plan):
            return f"these parameters have the factor {other:g}, which was asked for {part} and not for them"
    fitting = [words for words, predicted in _wrong_rates(plan, rates).items() if _equal(rates, predicted, plan)]
    return fitting[0] if len(fitting) == 1 else ""


def _wrong_rates(plan: Mapping[str, Any], applied: Sequence[float]) -> dict[str, list[float]]:
    """The learning rates that known mistakes give, by the mistake; those that the right schedule gives too left out."""
    steps, count = plan["steps"], len(applied)
    numbers = range(1, count + 1)

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
    found |= _other_ends(plan, applied)
    distinct = dict[tuple[float, ...], str]()
    for words, predicted in found.items():
        if not _equal(predicted, rates(), plan):
            distinct.setdefault(tuple(predicted), words)  # equal predictions are one mistake under two names
    return {words: list(predicted) for predicted, words in distinct.items()}


def _other_ends(plan: Mapping[str, Any], applied: Sequence[float]) -> dict[str, list[float]]:
    """The rates of a decay that ends at another step, or above zero, as the last of the applied rates has it."""
    steps, warmup, peak, number = plan["steps"], plan["warmup_steps"], plan["learning_rate"], len(applied)
    share, right = applied[-1] / peak, scheduled_rate(number, plan, steps) / peak
    numbers = range(1, number + 1)
    if plan["schedule"] == "constant" or number <= warmup + 2 or not (0 < share < 1 and right < 1):
        return {}
    done = 1 - share if plan["schedule"] == "linear" else math.acos(2 * share - 1) / math.pi
    end, least = round(warmup + (number - 1 - warmup) / done), (share - right) / (1 - right)
    later = [scheduled_rate(n, plan, end) for n in numbers]
    usual = [scheduled_rate(n, plan, steps) for n in numbers]
    above = [rate if n <= warmup else rate + least * (peak - rate) for n, rate in zip(numbers, usual, strict=True)]
    at_end, at_rate = f"the decay ends after {end} steps, not {steps}", f"at {least:.3g} times the peak, not at 0"
    if least <= 0:
        return {at_end: later}
    if _equal(later, above, plan):  # of a straight line both are true
        return {f"{at_end}, or {at_rate}": later}
    return {at_end: later, f"the decay ends {at_rate}": above}


def _times(factor: int) -> Callable[[int], int]:
    return lambda n: (n - 1) * factor + 1


def _cyclic(period: int) -> Callable[[int], int]:
    return lambda n: (n - 1) % period + 1
