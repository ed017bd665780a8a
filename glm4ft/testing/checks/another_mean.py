"""Recognises the wrong mean that an evaluation reported instead of the mean over all supervised tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

LARGEST_LOG = 700.0  # exp of more overflows


def explain_mean(reported: float, sums: Sequence[float], counts: Sequence[int], limit: float) -> str:
    """Find out which mean a reported figure is.

    Args:
        reported: The loss that an evaluation reported.
        sums: The summed loss of each row's supervised tokens, in the order of the data.
        counts: The number of supervised tokens of each row.
        limit: The largest relative difference that counts as rounding.
    Returns:
        How the mean was taken; "" if no known mistake of pipelines gives the figure.
    """
    return next((what for what, mean in _other_means(sums, counts) if abs(reported - mean) <= limit * mean), "")


def _other_means(sums: Sequence[float], counts: Sequence[int]) -> Iterator[tuple[str, float]]:
    num_rows, total, count = len(sums), sum(sums), sum(counts)
    yield "the perplexity is reported, exp of the mean", math.exp(min(total / count, LARGEST_LOG))
    yield "the mean is in bits", total / count / math.log(2)
    yield "the losses are added, not averaged", total
    yield "the rows' means are averaged, whatever their lengths", _mean_of_means(sums, counts, 1)
    for size in range(2, num_rows):
        yield f"the means of batches of {size} rows are averaged", _mean_of_means(sums, counts, size)
    for i in range(1, num_rows):
        twice = (total + sum(sums[:i])) / (count + sum(counts[:i]))
        yield f"the first {i} count twice, as when they fill up the last batch", twice
        if sum(counts[:-i]):
            yield f"the last {i} are left out, as when the last batch is dropped", sum(sums[:-i]) / sum(counts[:-i])


def _mean_of_means(sums: Sequence[float], counts: Sequence[int], size: int) -> float:
    batches = [(sum(sums[i : i + size]), sum(counts[i : i + size])) for i in range(0, len(sums), size)]
    means = [total / count for total, count in batches if count]
    return sum(means) / len(means)
