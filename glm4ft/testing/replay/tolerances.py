"""Numbers against their limits, in one place, so that each limit can be shown beside what it lets pass and what not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Observation:
    """One comparison.

    Args:
        name: of the threshold.
        size: that was measured; larger is worse.
        limit: it was compared with.
    """

    name: str
    size: float
    limit: float


_observers: list[list[Observation]] = []


def within(name: str, size: float, limit: float) -> bool:
    """Whether a size is at most its limit; NaN is not.

    Args:
        name: of the threshold, as docs/thresholds.md shows it.
        size: larger is worse.
        limit: the largest that passes.
    """
    for observer in _observers:
        observer.append(Observation(name, size, limit))
    return size <= limit


@contextmanager
def observing() -> Iterator[list[Observation]]:
    """Collect the comparisons made while the context is open."""
    seen: list[Observation] = []
    _observers.append(seen)
    try:
        yield seen
    finally:
        _observers.remove(seen)
