"""Compares curves with a baseline: identity first, then whole numbers, then one test for all losses and norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glm4ft.errors import ConfigError
from glm4ft.testing.baseline.baseline_file import Baseline, read_baseline, write_baseline
from glm4ft.testing.baseline.curves import Curve, first_unequal
from glm4ft.testing.baseline.environment import Tier
from glm4ft.testing.baseline.identity import difference
from glm4ft.testing.baseline.measure import Measured, Progress, measure, not_repeated
from glm4ft.testing.baseline.recordings import measure_recordings
from glm4ft.testing.baseline.repository import uncommitted
from glm4ft.testing.baseline.sign_flips import flip_test
from glm4ft.testing.subject import PLAN

Outcome = Literal["identical", "no difference", "differs", "not comparable"]
FIGURES = ("loss", "grad_norm")
WORDS = {"loss": "the loss", "grad_norm": "the gradient norm"}
# The smallest mean difference of a figure's logarithm that matters, so 1e-4 is a hundredth of a per cent. Measured by
# `tests/sweeps/baselines.py rounding` (Intel Xeon with AVX512, torch 2.13, 2026-11-27): healthy pipelines that only
# round otherwise reach 2e-7 with ten steps and 1.7e-6 with twenty; the same code with other instructions of the
# processor 3e-7, and that with one sign (p = 1/128), so a limit is needed. Devices that were not measured may round
# more coarsely: another device or library has ten times as much room.
SMALLEST_EFFECT = {Tier.SAME_LIBRARIES: 1e-5, Tier.OTHER: 1e-4}
RATE_LIMIT = 1e-6  # relative; a rate is a product of a few numbers in float64


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Args:
        outcome: ``identical`` in every bit; ``no difference`` larger than the rules allow; ``differs``; or ``not
            comparable``, since something else was trained.
        tier: How equal the two environments are.
        text: What was found, in words.
        p: The share of flips with at least such a statistic; None if the curves were not tested.
        level: The rate of false alarms of the test; None if the curves were not tested.
        effect: The largest size of the mean difference of a figure's logarithm; None if some figure is missing, not
            finite or not positive.
    """

    outcome: Outcome
    tier: Tier
    text: str
    p: float | None = None
    level: float | None = None
    effect: float | None = None

    @property
    def is_alarm(self) -> bool:
        """Whether somebody has to look: the curves differ, or cannot be compared."""
        return self.outcome in ("differs", "not comparable")

    def __str__(self) -> str:
        return f"{self.outcome} ({self.tier.value}): {self.text}"

    def record(self) -> dict[str, Any]:
        """The comparison in the form that ``glm4ft baseline compare --json`` writes."""
        told = {name: getattr(self, name) for name in ("outcome", "is_alarm", "text", "p", "level", "effect")}
        return {**told, "tier": self.tier.value}


def compare_again(
    file: Path, keep: Path | None = None, progress: Progress = iter, *, recordings: Sequence[Path] = (), base: str = ""
) -> Comparison:
    """Compare a baseline with the curves of today, of its subject run again or of recorded runs.

    Args:
        file: The baseline.
        keep: The file for today's curves, which the history draws; None to keep nothing. Curves of other data, and
            curves that are not finite, are not kept.
        progress: A function that passes the seeds on and shows how far it is.
        recordings: Folders that ``glm4ft record`` wrote, one for each seed of the baseline, in its order: for a
            baseline of recorded runs.
        base: The model folder of the recorded runs; by default the one that the first of them loaded.
    Raises:
        DataError: If the file cannot be read.
        ConfigError: If the baseline is of a subject and recordings are given, or of recordings and other than one for
            each seed is given.
    """
    baseline = read_baseline(file)
    _require_recordings_of(baseline, file, len(recordings))
    seeds = tuple(curve.seed for curve in baseline.curves)
    if recordings:
        measured = measure_recordings(recordings, base, progress)
    else:
        plan = {name: value for name, value in baseline.identity.plan.items() if name in PLAN}
        measured = measure(baseline.subject, baseline.model, plan=plan, seeds=seeds, progress=progress)
    found = compare(baseline, measured)
    if keep and found.outcome != "not comparable" and all(curve.is_finite for curve in measured.baseline.curves):
        write_baseline(keep, measured.baseline)
    return found


def _require_recordings_of(baseline: Baseline, file: Path, num_recordings: int) -> None:
    if baseline.subject and num_recordings:
        raise ConfigError("recordings cannot be compared with the baseline of a subject", where=str(file),
                          found=baseline.subject, fix="leave --recordings out: the subject is run again")  # fmt: skip
    if not baseline.subject and num_recordings != len(baseline.curves):
        raise ConfigError("the baseline is one of recorded runs", where=str(file), found=f"{num_recordings} recordings",
                          expected=f"one for each of its {len(baseline.curves)} seeds, in its order",
                          fix="record the runs again and name their folders with --recordings")  # fmt: skip


def compare(baseline: Baseline, measured: Measured) -> Comparison:
    """Compare curves that were measured just now with a baseline.

    Args:
        baseline: The baseline.
        measured: The current curves, of the same seeds.
    """
    now, tier = measured.baseline, tier_of(baseline, measured.baseline)
    other = difference(baseline.identity, now.identity, measured.rows, measured.tokenizer)
    if other:
        return Comparison("not comparable", tier, f"the runs are not those of the baseline: {other}")
    if words := not_repeated(measured):
        return Comparison("differs", tier, words)
    return compare_curves(baseline.curves, now.curves, tier)


def tier_of(before: Baseline, now: Baseline) -> Tier:
    """How equal the environments of two sets of curves are."""
    if before.environment != now.environment:
        return Tier.OTHER
    is_same = before.commit and before.commit == now.commit and not (now.subject and uncommitted(Path.cwd()))
    return Tier.SAME_COMMIT if is_same else Tier.SAME_LIBRARIES


def compare_curves(before: tuple[Curve, ...], now: tuple[Curve, ...], tier: Tier) -> Comparison:
    """Compare curves that are known to be of the same plan, base and data.

    Args:
        before: The curves of the baseline.
        now: The current curves, of the same seeds.
        tier: How equal the two environments are.
    """
    pairs = list(zip(before, now, strict=True))
    found = next((f"seed {a.seed}, {words}" for a, b in pairs if (words := first_unequal(a.steps, b.steps))), "")
    if not found:
        return Comparison("identical", tier, f"all figures of {len(pairs)} seeds are equal in every bit", effect=0.0)
    logs_SFT = _differences(pairs)
    effect = None if logs_SFT is None else float(np.abs(logs_SFT.mean(0)).max())
    if tier is Tier.SAME_COMMIT:
        text = f"the same commit in the same environment gives other figures ({found}): the run does not repeat"
        return Comparison("differs", tier, text, effect=effect)
    exact = next(_exact_differences(pairs), "")
    if exact or logs_SFT is None:
        return Comparison("differs", tier, exact or found, effect=effect)
    return replace(_tested(logs_SFT, tier), effect=effect)


def _differences(pairs: list[tuple[Curve, Curve]]) -> np.ndarray | None:
    """The differences of the logarithms of all figures, by seed, figure and step; None where one has no logarithm."""
    if any(len(old.steps) != len(new.steps) for old, new in pairs):
        return None
    figures_2SFT = np.array([
        [[[getattr(step, name) for step in curve.steps] for name in FIGURES] for curve in curves]
        for curves in zip(*pairs, strict=True)
    ])  # fmt: skip
    if not (np.isfinite(figures_2SFT) & (figures_2SFT >= 0)).all():
        return None
    old_SFT, new_SFT = np.log(np.maximum(figures_2SFT, np.finfo(float).tiny))  # a norm of exactly zero is possible
    return np.asarray(new_SFT - old_SFT)


def _exact_differences(pairs: list[tuple[Curve, Curve]]) -> Iterator[str]:
    """Differences that no rounding explains: numbers of steps and tokens, learning rates, figures not finite."""
    for old, new in pairs:
        if len(old.steps) != len(new.steps):
            yield f"seed {new.seed} takes {len(new.steps)} optimizer steps, in the baseline {len(old.steps)}"
        for a, b in zip(old.steps, new.steps, strict=False):
            where = f"seed {new.seed}, step {b.step}"
            for name in FIGURES:
                if not (math.isfinite(getattr(b, name)) and getattr(b, name) >= 0):
                    yield f"{where}: {WORDS[name]} is {getattr(b, name)}, in the baseline {getattr(a, name):.6g}"
            for name in ("tokens", "supervised_tokens"):
                if getattr(a, name) != getattr(b, name):
                    words = name.replace("_", " ")
                    yield f"{where}: {getattr(b, name)} {words}, in the baseline {getattr(a, name)}"
            if not abs(a.learning_rate - b.learning_rate) <= RATE_LIMIT * abs(a.learning_rate):
                yield f"{where}: the learning rate is {b.learning_rate:.8g}, in the baseline {a.learning_rate:.8g}"


def _tested(logs_SFT: np.ndarray, tier: Tier) -> Comparison:
    num_seeds, _, num_steps = logs_SFT.shape
    smallest = SMALLEST_EFFECT[tier]
    test = flip_test(logs_SFT.reshape(num_seeds, -1), smallest)
    matters = test.significant_P & (np.abs(test.mean_P) >= smallest)
    largest = float(np.abs(test.mean_P).max())
    rule = f"p = {test.p:.3g}, {num_seeds} seeds, rate of false alarms {test.level:.3g}"
    if not matters.any():
        text = f"the largest mean difference is {largest:.2g} of the figure, and none is an alarm ({rule})"
        return Comparison("no difference", tier, text, test.p, test.level)
    first, most = int(np.flatnonzero(matters)[0]), int(np.argmax(np.where(matters, np.abs(test.mean_P), 0)))
    told = [_told(point, num_steps, float(test.mean_P[point])) for point in dict.fromkeys((first, most))]
    return Comparison("differs", tier, f"{'; '.join(told)} ({rule})", test.p, test.level)


def _told(point: int, num_steps: int, mean: float) -> str:
    figure, step = divmod(point, num_steps)
    change = math.expm1(mean)
    size = f"{100 * abs(change):#.3g}".rstrip(".")
    return f"at step {step + 1}, {WORDS[FIGURES[figure]]} is {size}% {'higher' if change > 0 else 'lower'}"
