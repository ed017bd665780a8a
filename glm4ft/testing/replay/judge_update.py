"""Judges the update that a recorded step makes of its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from glm4ft.testing.recording.trace import Tensors
from glm4ft.testing.replay.comparison import relative
from glm4ft.testing.replay.departure import Departures
from glm4ft.testing.replay.step import ReplayedStep
from glm4ft.testing.replay.tolerances import EXPLAINED
from glm4ft.testing.specification.update_rule import AdamW


def judge_update(step: ReplayedStep) -> Departures:
    """Report an update other than AdamW's, and parameters that are not optimized or change between two steps."""
    recorded, previous = step.step, step.history.previous
    if previous:
        moved = [name for name, after in previous.after.items() if not torch.equal(after, recorded.before[name])]
        if moved:
            cause = ""
            if all(torch.equal(t, t.bfloat16().to(t.dtype)) for t in recorded.before.values()):
                cause = "they are rounded to bfloat16, which loses small updates"
            elif all(torch.equal(recorded.before[name], previous.before[name]) for name in moved):
                cause = "they are as before the last update, which did not reach the model: it changed a copy"
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
    size = _update_size(step)
    cause = "" if size <= step.limit("update") else _update_cause(step)
    yield step.depart("update", f"the update is {size:.1e} off AdamW's ({recorded.optimizer})", cause, size)


def _rates(step: ReplayedStep) -> dict[str, float]:
    """The learning rate of each trained parameter; that of the first group for those in no group."""
    groups = [group for group in step.step.groups if group.size]
    common = float(groups[0].settings["lr"])
    return dict.fromkeys(step.step.before, common) | {n: float(g.settings["lr"]) for g in groups for n in g.names}


def _update_size(step: ReplayedStep) -> float:
    recorded = step.step
    expected = step.history.optimizer.update(recorded.before, recorded.clipped, _rates(step))
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
    plan = step.history.plan
    for name in ("weight_decay", "betas", "eps"):
        asked, others = plan[name], plan.get("weight_decays", {}) if name == "weight_decay" else {}
        for group in step.step.groups:
            got = group.settings.get(name)
            if not set(group.names) <= set(others) and got is not None and not _is_equal(got, asked):
                return f"{name} is {got}, not {asked}"
    if step.step.groups[0].settings.get("amsgrad"):
        return "amsgrad is on"
    return _variant_cause(step) if step.number == 1 else _cleared_cause(step)


def _cleared_cause(step: ReplayedStep) -> str:
    """That the update is the first one of a new AdamW, if it is."""
    plan, recorded = step.history.plan, step.step
    anew = AdamW(plan["betas"], plan["eps"], plan["weight_decay"], plan.get("weight_decays"))
    after = anew.update(recorded.before, recorded.clipped, _rates(step))
    got, first = (
        {name: tensors[name].double() - recorded.before[name].double() for name in after}
        for tensors in (recorded.after, after)
    )
    is_first = relative(got, first) <= EXPLAINED
    return "the optimizer's moments were cleared: it is the update of a first step" * is_first


def _is_equal(got: Any, asked: Any) -> bool:
    return torch.equal(torch.tensor(got), torch.tensor(asked))


def _variant_cause(step: ReplayedStep) -> str:
    """The one variant of AdamW that gives the first update; "" if none does, or several do."""
    plan, recorded = step.history.plan, step.step
    rates = _rates(step)
    (beta1, beta2), eps, decay = plan["betas"], plan["eps"], plan["weight_decay"]

    def moved(first: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
        return {n: -rates[n] * (first(recorded.clipped[n].double()) + decay * recorded.before[n].double())
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
