"""Compares measured sizes with their limits in one place, so that each limit can be listed with the sizes it met."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Observation:
    """One comparison of a measured size with its limit.

    Args:
        name: The name of the threshold.
        size: The measured size; larger is worse.
        limit: The largest size that passes.
    """

    name: str
    size: float
    limit: float


_observers: list[list[Observation]] = []


def within(name: str, size: float, limit: float) -> bool:
    """Whether a size is at most its limit; False for NaN.

    Args:
        name: The name of the threshold in docs/thresholds.md.
        size: The measured size; larger is worse.
        limit: The largest size that passes.
    """
    for observer in _observers:
        observer.append(Observation(name, size, limit))
    return size <= limit


@contextmanager
def observing() -> Iterator[list[Observation]]:
    """Collect the comparisons that ``within`` makes while the context is open."""
    seen: list[Observation] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.remove(seen)
