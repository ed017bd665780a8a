"""The captions of a run's curves: what the eye does not read off them."""

from __future__ import annotations

import statistics

from glm4ft.report.content import Curves

KNEE = 0.9  # the share of the whole fall after which the rest is called slow


def loss_caption(curves: Curves) -> str:
    """When most of the fall was done, and how the evaluations went on beside it."""
    known = [(step, loss) for step, loss in zip(curves.steps, curves.loss, strict=True) if loss is not None]
    if not known:
        return "No finite loss."
    (first, begin), (last, end) = known[0], known[-1]
    told = [f"From {begin:.3g} at step {first:,} to {end:.3g} at step {last:,}"]
    if len(known) > 2 and end < begin:
        knee = next(step for step, loss in known if begin - loss >= KNEE * (begin - end))
        told[0] += f", {KNEE:.0%} of the fall by step {knee:,}"
    if low := _first_not_finite(curves.steps, curves.loss):
        told.append(low)
    if evaluations := [(loss, step) for step, loss in curves.evaluations if loss is not None]:
        (lowest, at), (end, last) = min(evaluations), evaluations[-1]
        rise = f", and {end:.3g} at the last one" if end > lowest else ""
        told.append(f"On held-out conversations lowest at step {at:,}, {lowest:.3g}{rise}")
    return ". ".join(told) + "."


def norm_caption(curves: Curves) -> str:
    """The largest norm, against the usual one, and how often it was scaled down."""
    known = [(norm, step) for step, norm in zip(curves.steps, curves.grad_norm, strict=True) if norm is not None]
    if not known:
        return "No finite norm."
    (largest, at), usual = max(known), statistics.median(norm for norm, _ in known)
    told = [f"Largest {largest:.3g} at step {at:,}, median {usual:.3g}"]
    if curves.clip:
        num_clipped = sum(norm > curves.clip for norm, _ in known)
        told.append(f"Scaled down to {curves.clip:g} in {num_clipped:,} of {len(known):,} steps")
    if low := _first_not_finite(curves.steps, curves.grad_norm):
        told.append(low)
    return ". ".join(told) + "."


def rate_caption(curves: Curves) -> str:
    """The shape of the schedule."""
    known = [(step, rate) for step, rate in zip(curves.steps, curves.rate, strict=True) if rate is not None]
    if not known:
        return "No rate is known."
    peak, end = max(rate for _, rate in known), known[-1][1]
    rises = next(step for step, rate in known if rate == peak)
    warm_up = f"Rises until step {rises:,}, to {peak:g}" if rises > known[0][0] else f"{peak:g} from the first step on"
    if end == peak:
        return f"{warm_up}, and stays there."
    return f"{warm_up}; {end / peak:.0%} of that at the end."


def _first_not_finite(steps: tuple[int, ...], values: tuple[float | None, ...]) -> str:
    missing = [step for step, value in zip(steps, values, strict=True) if value is None]
    return f"Not finite in {len(missing):,} of {len(steps):,} steps, first at step {missing[0]:,}" if missing else ""
