"""Writes the measured figures of docs/baselines.md, between two comments there, from the results of the sweeps."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from glm4ft.testing.baseline.compare import SMALLEST_EFFECT
from glm4ft.testing.baseline.environment import Tier, environment
from glm4ft.testing.baseline.sign_flips import LEVEL
from glm4ft.testing.faults.pages import table
from glm4ft.testing.faults.registry import all_faults
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.trial.stages import STAGES

BEGIN, END = "<!-- measured: python tests/sweeps/baselines.py page -->", "<!-- /measured -->"
# Healthy variations that train otherwise, so that their curves may differ; all others do in exact arithmetic what the
# plain loop does.
OTHERWISE = {
    "other-seed", "rows-by-length", "end-of-text", "warm-up-above-zero", "rank-and-alpha-patterns", "rank-stabilised",
    "adapter-on-the-head", "one-layer", "dora", "excluded-modules", "dropout-requested",
}  # fmt: skip
LOW_PRECISION = {"bf16-autocast"}  # rounds otherwise on purpose
# Take a factor out of the gradient before the optimizer uses it; the recorded norm is that of the gradient as it
# accumulates, so its curve has the factor, while the parameters are those of the plain loop.
SCALED = {"loss-scaling", "gradient-divided-after-accumulation"}
Result = Mapping[str, Any]


def write_figures(page: Path, results: Sequence[Result]) -> None:
    """Write the figures into the page.

    Args:
        page: The page, with the two comments.
        results: The results of the sweeps.
    Raises:
        ValueError: If the page has no place for them.
    """
    text = page.read_text("utf-8")
    if not 0 <= text.find(BEGIN) < text.find(END):
        raise ValueError(f"{page} does not have {BEGIN} and then {END}")
    rounding, instructions, clean, limits, faults = (
        [found for found in results if found["sweep"] == sweep]
        for sweep in ("rounding", "instructions", "false-alarms", "limits", "faults")
    )
    parts = [_origin(), *_rounding(rounding, instructions), _false_alarms(clean), *_limits(limits),
             *_faults(faults, farthest_rounding(rounding))]  # fmt: skip
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    page.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + after, "utf-8")


def _origin() -> str:
    where = environment()
    return _wrapped(
        f"Measured with the plain loop on {where['device']}, torch {where['torch']}, transformers "
        f"{where['transformers']}, peft {where['peft']}, {datetime.now(UTC):%Y-%m-%d}; eight seeds, ten steps."
    )


def _runs(results: Iterable[Result]) -> Iterator[tuple[str, Result]]:
    for found in results:
        for one in found["runs"]:
            yield found["id"], one


def _rounds_only(results: Iterable[Result]) -> list[Result]:
    return [r for r in results if r["id"] not in OTHERWISE | LOW_PRECISION | SCALED]


def farthest_rounding(results: Sequence[Result]) -> float:
    """The largest distance of the parameters at the end among healthy pipelines that only round otherwise."""
    return max(one["distance"] for _, one in _runs(_rounds_only(results)))


def _rounding(results: Sequence[Result], instructions: Sequence[Result]) -> list[str]:
    same = _rounds_only(results)
    id, largest = max(_runs(same), key=lambda found: float(found[1]["effect"]))
    low = [one["effect"] for _, one in _runs(r for r in results if r["id"] in LOW_PRECISION)]
    rows = [
        (f"{len(same)} healthy variations of the loop that compute the same otherwise",
         f"{largest['effect']:.1e} (`{id}`, {largest['plan']})"),
        *((f"the same code and libraries with {r['id']}", f"{max(one['effect'] for one in r['runs']):.1e}")
          for r in instructions),
        ("bf16 autocast for fp32", f"{max(low):.1e}"),
    ]  # fmt: skip
    limits = [SMALLEST_EFFECT[tier] for tier in (Tier.SAME_LIBRARIES, Tier.OTHER)]
    told = (
        "**The smallest effects that matter** stand on what changes when nothing but the rounding does: the largest "
        "mean difference of the logarithm of loss or norm. They are "
        f"{limits[0]:.0e} on the same machine and libraries, and {limits[1]:.0e} on others."
    )
    return [_wrapped(told), table(("change", "largest mean difference"), rows).strip()]


def _false_alarms(results: Sequence[Result]) -> str:
    alarms, count = sum(r["is_alarm"] for r in results), len(results)
    low, high = interval(alarms, count)
    return _wrapped(
        f"**False alarms.** {alarms} of {count} comparisons of runs that differ in noise alone, each with fresh seeds: "
        f"{alarms / count:.2%}, with a 95 % interval (Clopper and Pearson) of {low:.2%} to {high:.2%}. "
        f"Stated: at most {LEVEL:.2%}."
    )


def interval(alarms: int, count: int) -> tuple[float, float]:
    """The exact 95 % interval of a rate, by bisection of the binomial distribution.

    Args:
        alarms: The number of alarms.
        count: The number of comparisons.
    Source: Clopper and Pearson, Biometrika 26 (1934).
    """

    def at_most(k: int, p: float) -> float:
        return sum(math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k + 1))

    def solve(holds: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    lower = 0.0 if alarms == 0 else solve(lambda p: 1 - at_most(alarms - 1, p) < 0.025)
    return lower, solve(lambda p: at_most(alarms, p) > 0.025)


def _limits(results: Sequence[Result]) -> list[str]:
    rows = []
    for found in results:
        cells = {one["plan"]: f"{100 * one['effect']:.2g}%: {_first(one)}" for one in found["runs"]}
        rows.append((found["id"], cells.get("padded", ""), cells.get("packed", "")))
    told = "**Detection limits.** Each change alone, with the largest mean difference, and where it is first told."
    return [told, table(("change", "padded", "packed"), rows).strip()]


def _first(one: Result) -> str:
    if not one["is_alarm"]:
        return "not noticed"
    return str(one["text"]).partition(" (p = ")[0].partition("; ")[0].removeprefix("at ")


def _faults(all_results: Sequence[Result], farthest: float) -> list[str]:
    faults = all_faults()
    asking = [r["id"] for r in all_results if faults[r["id"]].subject.lora != Subject.lora]
    results = [r for r in all_results if r["id"] not in asking]
    noticed = {r["id"]: any(one["is_alarm"] for one in r["runs"]) for r in results}
    stopped = [r["id"] for r in results if any(one["outcome"] == "stopped" for one in r["runs"])]
    changed = [r["id"] for r in results if r["id"] not in stopped and changes_the_optimisation(r, farthest)]
    missed = [id for id in changed if not noticed[id]]
    rest = [id for id in noticed if id not in changed and id not in stopped]
    kept = Counter(faults[id].stage for id in changed)
    seen = Counter(faults[id].stage for id in changed if noticed[id])
    count = Counter(faults[id].stage for id in noticed)
    rows = [(stage, str(count[stage]), str(kept[stage]), str(seen[stage])) for stage in STAGES if count[stage]]
    share = f"{(len(changed) - len(missed)) / len(changed):.1%}"
    told = (
        f"**Faults.** Of the {len(all_results)} faults of the [kill matrix](kill-matrix.md), {len(asking)} ask for "
        "other adapters than the plain loop, so that there is no healthy curve to compare with: the identity tells "
        f"them, and they are left out here. Of the other {len(noticed)}, {len(changed)} change the optimisation, and "
        f"the comparison alone notices {len(changed) - len(missed)} of those ({share}). A fault "
        "changes the optimisation if the trained parameters at the end of some run differ from those of the healthy "
        "pipeline with the same seed: their distance, as a share of the healthy run's way from its start, is larger "
        f"than that of any pipeline that only rounds otherwise ({farthest:.0e}), or they are other parameters. Neither "
        f"losses and norms nor any verdict take part in that. {len(stopped)} more stop the run on these data."
    )
    others = [id for id in rest if noticed[id]]
    more = (
        f"Not noticed: {_named(missed)}. {len(rest)} faults end with the healthy parameters in these plans: they "
        "concern evaluation, logs, files, resuming and several processes, or options and rows that the plans and "
        f"conversations here do not have. The comparison notices {len(others)} of them all the same: {_named(others)}. "
        f"The others: {_named([id for id in rest if not noticed[id]])}."
    )
    return [
        _wrapped(told),
        table(("stage", "faults", "change the optimisation", "noticed"), rows).strip(),
        _wrapped(more),
    ]


def changes_the_optimisation(result: Result, farthest: float) -> bool:
    """Whether the parameters at the end of some run are farther from the healthy ones than rounding takes them."""
    return any(not one.get("distance", 0.0) <= farthest for one in result["runs"])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _named(ids: Sequence[str]) -> str:
    return ", ".join(f"`{id}`" for id in ids) or "none"
