"""Trace against reference, stage by stage: the first that departs is where the pipeline is wrong.

Each stage is judged from its own recorded input, so a fault shows where it is and not in all that follows from it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from glm4ft.chat_format import IGNORED
from glm4ft.testing.reference import (
    AdamW,
    Reference,
    Targets,
    clip_factor,
    recover_targets,
    scheduled_rate,
    split_rows,
)
from glm4ft.testing.trace import Step, Tensors, Trace

Row = tuple[tuple[int, ...], tuple[int, ...]]  # input ids and unshifted labels

# Largest relative departure that is rounding, by the dtype of the base.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# A token's weight is read off a gradient that shrinks as the model grows sure of it, so it is known less well.
WEIGHT_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
# Cosine between a gradient at the final norm and that of cross entropy with the best label; below, it is another loss.
FIT_LIMITS = {torch.float32: 0.999, torch.bfloat16: 0.98}
# A target this sure may leave no gradient in the dtype of the run; a surer one says nothing about the mask.
SURE = 0.999


@dataclass(frozen=True)
class Departure:
    """Where a run left the specification.

    Args:
        stage: slug of the stage.
        step: optimiser step, from 1.
        text: what was found and what was expected.
        cause: the likely one, if the numbers give it away.
        size: relative; nan where a number says nothing.
    """

    stage: str
    step: int
    text: str
    cause: str = ""
    size: float = math.nan

    def __str__(self) -> str:
        cause = f"; likely cause: {self.cause}" if self.cause else ""
        return f"{self.stage}, step {self.step}: {self.text}{cause}"


@dataclass
class Verdict:
    """What a replay found.

    Args:
        departure: the first, or None.
        largest: stage to the largest relative departure seen in it, for stages judged by a number.
        steps: optimiser steps compared.
        packed: whether a row stood behind another in the same row of a batch.
    """

    departure: Departure | None = None
    largest: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    packed: bool = False


def replay(trace: Trace, reference: Reference, rows: Sequence[Row], plan: Mapping[str, Any]) -> Verdict:
    """Compare a recorded run with the specification.

    Args:
        trace: of the run's first steps.
        reference: on the base that the run started from.
        rows: what the data should have become; no two with the same ids.
        plan: that the trainer was asked to follow.
    Returns:
        The verdict. Within a step the stages are judged in order, and the first departure ends the replay.
    """
    verdict, history = Verdict(), _History(reference, dict(rows), plan, LIMITS[trace.dtype], trace.dtype)
    if not trace.steps:
        verdict.departure = Departure("update", 1, "no optimiser step changed a trained parameter")
    for number, step in enumerate(trace.steps, start=1):
        replayed = _ReplayedStep(number, step, history)
        verdict.packed = verdict.packed or any(not row.is_first for row in replayed.seen)
        for stage, judge in replayed.stages():
            for departure in judge():
                if math.isfinite(departure.size):
                    verdict.largest[stage] = max(verdict.largest.get(stage, 0.0), departure.size)
                if not departure.size <= LIMITS[trace.dtype]:
                    verdict.departure = _hidden_by_zero_b(departure, trace, history) or departure
                    return verdict
        verdict.steps = number
        history.previous = step
    return verdict


def _hidden_by_zero_b(departure: Departure, trace: Trace, history: _History) -> Departure | None:
    """The model's departure behind one of the first gradient.

    While B is zero, an adapter with the wrong scale changes the gradient but not yet the output; one step on, it does.
    """
    if departure.stage != "gradient" or departure.step != 1 or len(trace.steps) < 2:
        return None
    for later in _ReplayedStep(2, trace.steps[1], history).model():
        if not later.size <= history.limit:
            scale = departure.cause.removeprefix("it is ").removesuffix(" times the token mean")
            cause = f"the adapter's scale: before B moved, its gradient was {scale} times what it should be"
            return replace(later, cause=cause if scale != departure.cause else later.cause)
    return None


class _History:
    """What a step is judged by: the specification, and what went before."""

    def __init__(
        self, reference: Reference, labels: dict[Any, Any], plan: Mapping[str, Any], limit: float, dtype: torch.dtype
    ) -> None:
        self.reference, self.labels, self.plan, self.limit, self.dtype = reference, labels, dict(plan), limit, dtype
        self.optimizer = AdamW(plan["betas"], plan["eps"], plan["weight_decay"])
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.previous: Step | None = None


@dataclass(frozen=True)
class _SeenRow:
    """A row as it went through the model; ``is_first`` if nothing stood before it in its row of the batch."""

    ids: tuple[int, ...]
    forward: int
    is_first: bool
    hidden_TD: torch.Tensor
    targets: Targets


class _ReplayedStep:
    """One step's judges; each yields departures with their size, the limit is applied by the caller."""

    def __init__(self, number: int, step: Step, history: _History) -> None:
        self.number, self.step, self.history, self.reference = number, step, history, history.reference

    def stages(self) -> list[tuple[str, Callable[[], Iterator[Departure]]]]:
        return [
            ("rows", self.rows),
            ("batches", self.batches),
            ("model", self.model),
            ("gradient", self.gradient),
            ("clipping", self.clipping),
            ("schedule", self.schedule),
            ("update", self.update),
        ]

    @cached_property
    def seen(self) -> list[_SeenRow]:
        found = []
        for index, forward in enumerate(self.step.forwards):
            assert forward.gradient_BTD is not None
            for b, places in split_rows(forward):
                ids = forward.input_ids_BT[b][places]
                hidden, gradient = forward.hidden_BTD[b][places], forward.gradient_BTD[b][places]
                targets = recover_targets(hidden, gradient, self.reference.head, ids)
                found.append(_SeenRow(tuple(ids.tolist()), index, int(places[0]) == 0, hidden, targets))
        return found

    @cached_property
    def rows_of_step(self) -> list[Row]:
        return [(row.ids, self.history.labels[row.ids]) for row in self.seen]

    @cached_property
    def num_targets(self) -> int:
        return sum(label != IGNORED for _, labels in self.rows_of_step for label in labels[1:])

    def _depart(self, stage: str, text: str, cause: str = "", size: float = math.nan) -> Departure:
        return Departure(stage, self.number, text, cause, size)

    def rows(self) -> Iterator[Departure]:
        for row in self.seen:
            if row.ids not in self.history.labels:
                yield self._unknown_row(row)
                return
            yield from self._wrong_targets(row)

    def _unknown_row(self, row: _SeenRow) -> Departure:
        for known in self.history.labels:
            if known[: len(row.ids)] == row.ids:
                return self._depart("rows", f"a row was cut to {len(row.ids)} of its {len(known)} tokens", "truncation")

        def shared(known: tuple[int, ...]) -> int:
            same = [a == b for a, b in zip(known, row.ids, strict=False)]
            return same.index(False) if False in same else len(same)

        nearest = max(self.history.labels, key=shared)
        at = shared(nearest)
        found, expected = row.ids[at : at + 3], nearest[at : at + 3]
        text = f"a row is no conversation's: at position {at} ids {list(found)} stand for {list(expected)}"
        return self._depart("rows", text)

    def _wrong_targets(self, row: _SeenRow) -> Iterator[Departure]:
        expected, got = torch.tensor(self.history.labels[row.ids]), row.targets.labels_T
        expected[0] = IGNORED  # nothing predicts the first token
        trained = got != IGNORED
        ids = torch.tensor(row.ids)
        wrong_value = trained & (got != ids)
        if int(wrong_value.sum()) > int(trained.sum()) // 2:
            return  # another token is trained than the one that stands there: judged as the loss's arithmetic
        missing = (expected != IGNORED) & ~trained & self._unsure(row, expected)
        extra = trained & (expected == IGNORED)
        if missing.any() or extra.any():
            words = [
                f"position {t} (id {row.ids[t]}) is {'trained' if extra[t] else 'not trained'}"
                for t in (missing | extra).nonzero()[:, 0].tolist()[:4]
            ]
            yield self._depart(
                "rows",
                f"{int(extra.sum())} tokens are trained that should not be, "
                f"{int(missing.sum())} are not that should: " + ", ".join(words),
            )

    def _unsure(self, row: _SeenRow, expected: torch.Tensor) -> torch.Tensor:
        """Where the model gives the expected target a probability that leaves a gradient to be seen."""
        probability = torch.zeros(len(expected))
        logits = row.hidden_TD[:-1] @ self.reference.head.weight.float().T
        targets = expected[1:].clamp_min(0)
        probability[1:] = logits.softmax(1).gather(1, targets[:, None])[:, 0]
        return probability < SURE

    def batches(self) -> Iterator[Departure]:
        self.history.seen.update(row.ids for row in self.seen)
        counts = [self.history.seen[ids] for ids in self.history.labels]
        if max(counts) - min(counts) > 1:
            again = next(ids for ids in self.history.labels if self.history.seen[ids] == max(counts))
            text = f"a row ({len(again)} tokens) was seen {max(counts)} times, another {min(counts)} times"
            yield self._depart("batches", text, "rows repeat within an epoch")
        for row, size in self._hidden_departures():
            if not row.is_first and self._first_rows_agree():
                text = f"a row that follows another is {size:.1e} off what it is alone"
                yield self._depart("batches", text, "packed rows or padding are attended to", size)

    @cached_property
    def _hidden_sizes(self) -> list[tuple[_SeenRow, float]]:
        sizes = []
        for row in self.seen:
            with torch.no_grad():
                alone = self.reference.hidden(row.ids, self.step.before)
            sizes.append((row, float((row.hidden_TD - alone).norm() / alone.norm())))
        return sizes

    def _hidden_departures(self) -> Iterator[tuple[_SeenRow, float]]:
        yield from self._hidden_sizes

    def _first_rows_agree(self) -> bool:
        return all(size <= self.history.limit for row, size in self._hidden_sizes if row.is_first)

    def model(self) -> Iterator[Departure]:
        if self.number == 1:
            touched = [name for name, t in self.step.before.items() if ".lora_B." in name and t.abs().max() > 0]
            if touched:
                yield self._depart("model", f"{len(touched)} matrices B are not zero at the start, as {touched[0]}")
        if not all(forward.training for forward in self.step.forwards):
            yield self._depart("model", "the model is not in training mode")
        for _, size in self._hidden_sizes:
            cause = "another base, adapter scale or dtype than asked for"
            yield self._depart("model", f"the final norm's output is {size:.1e} off the specification", cause, size)

    def gradient(self) -> Iterator[Departure]:
        for row in self.seen:
            yield from self._wrong_loss(row)
        yield from self._wrong_weights()
        expected = self.reference.gradient(self.rows_of_step, self.step.before)
        size = relative(self.step.raw, expected)
        cause = self._gradient_cause(expected) if not size <= self.history.limit else ""
        yield self._depart("gradient", f"the gradient is {size:.1e} off the token mean", cause, size)

    def _wrong_loss(self, row: _SeenRow) -> Iterator[Departure]:
        if not row.targets.fit >= FIT_LIMITS[self.history.dtype]:
            text = f"a gradient at the final norm is no cross entropy of one label (cosine {row.targets.fit:.4f})"
            yield self._depart("gradient", text, "label smoothing, or another term in the loss")
        got, ids = row.targets.labels_T, torch.tensor(row.ids)
        trained = (got != IGNORED).nonzero()[:, 0]
        if int((got[trained] != ids[trained]).sum()) > len(trained) // 2:
            following = [t for t in trained.tolist() if t + 1 < len(ids) and got[t] == ids[t + 1]]
            before = [t for t in trained.tolist() if t and got[t] == ids[t - 1]]
            cause = ""
            if len(following) > max(len(before), len(trained) // 2):
                cause = "labels are shifted twice: each position learns the token after next"
            elif len(before) > len(trained) // 2:
                cause = "labels are not shifted: each position learns its own token"
            yield self._depart("gradient", "the trained labels are not the next tokens", cause)

    def _wrong_weights(self) -> Iterator[Departure]:
        """Every token of a step counts the same: one over the number of supervised tokens."""
        ratios: dict[int, list[float]] = {}
        for row in self.seen:
            # a confident token's weight is a quotient of two small numbers
            heavy = row.targets.weights_T[row.targets.labels_T != IGNORED] * self.num_targets
            ratios.setdefault(row.forward, []).extend(heavy.tolist())
        medians = {index: sorted(values)[len(values) // 2] for index, values in ratios.items() if values}
        worst = max(medians.values(), key=lambda ratio: abs(ratio - 1), default=1.0)
        if abs(worst - 1) <= WEIGHT_LIMITS[self.history.dtype]:
            return
        low, high = min(medians.values()), max(medians.values())
        if high - low <= WEIGHT_LIMITS[self.history.dtype] * high:
            cause = f"the loss is {high:.4g} times the token mean"
            if abs(high - self.history.plan["accumulation"]) <= 1e-2 * high:
                cause += ": not divided by the number of micro-batches"
        else:
            cause = "a mean of micro-batch means: tokens of short micro-batches weigh more"
        text = f"tokens count {low:.4g} to {high:.4g} times what they should"
        yield self._depart("gradient", text, cause)

    def _gradient_cause(self, expected: Tensors) -> str:
        raw, previous = self.step.raw, self.history.previous
        if (
            previous
            and relative({n: raw[n] - previous.clipped[n] for n in raw if n in previous.clipped}, expected) < 0.1
        ):
            return "the gradient of the step before was not cleared"
        scale = _dot(raw, expected) / _dot(expected, expected)
        if relative(raw, {name: scale * tensor for name, tensor in expected.items()}) <= 10 * self.history.limit:
            return f"it is {scale:.4g} times the token mean"
        return ""

    def clipping(self) -> Iterator[Departure]:
        limit = self.history.plan["max_grad_norm"]
        norm, factor = clip_factor(self.step.raw, limit)
        size = relative(self.step.clipped, {name: factor * tensor for name, tensor in self.step.raw.items()})
        got = _dot(self.step.clipped, self.step.raw) / norm**2
        text = f"the gradient of norm {norm:.4g} was multiplied by {got:.4g}, not {factor:.4g}"
        cause = "it was not clipped" if abs(got - 1) <= 1e-6 else ""
        yield self._depart("clipping", text, cause, size)

    def schedule(self) -> Iterator[Departure]:
        plan = self.history.plan
        expected = scheduled_rate(self.number, plan, plan["steps"])
        for group in self.step.groups:
            got = float(group.settings["lr"])
            size = abs(got - expected) / plan["learning_rate"]
            yield self._depart("schedule", f"the rate is {got:.6g}, not {expected:.6g}", "", size)

    def update(self) -> Iterator[Departure]:
        step = self.step
        rate = float(step.groups[0].settings["lr"])
        unused = sorted(set(step.before) - {name for group in step.groups for name in group.names})
        if unused:
            text = f"{len(unused)} trained parameters are not in the optimiser, as {unused[0]}"
            yield self._depart("update", text)
        expected = self.history.optimizer.update(step.before, step.clipped, rate)
        moved = {name: expected[name] - step.before[name] for name in expected}
        got = {name: step.after[name].double() - step.before[name] for name in expected}
        # a parameter in fp32 cannot move by less than its own rounding
        rounding = math.sqrt(sum(float((t.double() * 2**-24).pow(2).sum()) for t in step.before.values()))
        off = math.sqrt(sum(float((got[n] - moved[n]).pow(2).sum()) for n in got))
        total = math.sqrt(sum(float(t.pow(2).sum()) for t in moved.values()))
        size = max(0.0, off - rounding) / total if total else off
        cause = self._update_cause() if not size <= self.history.limit else ""
        yield self._depart("update", f"the update is {size:.1e} off AdamW's ({step.optimizer})", cause, size)

    def _update_cause(self) -> str:
        if self.step.optimizer != "AdamW":
            return f"the optimiser is {self.step.optimizer}"
        for name in ("weight_decay", "betas", "eps"):
            asked = self.history.plan[name]
            for group in self.step.groups:
                got = group.settings.get(name)
                if group.names and not torch.equal(torch.tensor(got), torch.tensor(asked)):
                    return f"{name} is {got}, not {asked}"
        return ""


def relative(got: Tensors, expected: Tensors) -> float:
    """Norm of the difference over the norm of what was expected, over all tensors; inf if one is missing."""
    if got.keys() != expected.keys():
        return math.inf
    off = sum(float((got[name].double() - expected[name].double()).pow(2).sum()) for name in expected)
    size = sum(float(tensor.double().pow(2).sum()) for tensor in expected.values())
    return math.sqrt(off / size) if size else math.sqrt(off)


def _dot(a: Tensors, b: Tensors) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a if name in b)
