"""Which other mean an evaluation took, if its figure is not the mean over all supervised tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def explain_mean(said: float, sums: Sequence[float], counts: Sequence[int], limit: float) -> str:
    """Name the mean that gives the figure that was said.

    Args:
        said: by an evaluation.
        sums: loss of each row, over its supervised tokens, in the order of the data.
        counts: supervised tokens of each row.
        limit: largest relative difference that is rounding.
    Returns:
        What was done; "" if nothing that pipelines are known to do gives the figure.
    """
    return next((what for what, mean in _other_means(sums, counts) if abs(said - mean) <= limit * mean), "")


def _other_means(sums: Sequence[float], counts: Sequence[int]) -> Iterator[tuple[str, float]]:
    num_rows, total, count = len(sums), sum(sums), sum(counts)
    yield "the rows' means are averaged, long or short", _mean_of_means(sums, counts, 1)
    for size in range(2, num_rows):
        yield f"the means of batches of {size} rows are averaged", _mean_of_means(sums, counts, size)
    for i in range(1, num_rows):
        twice = (total + sum(sums[:i])) / (count + sum(counts[:i]))
        yield f"the first {i} count twice, as where they fill up the last batch", twice
        if sum(counts[:-i]):
            yield f"the last {i} are left out, as a last batch is dropped", sum(sums[:-i]) / sum(counts[:-i])


def _mean_of_means(sums: Sequence[float], counts: Sequence[int], size: int) -> float:
    batches = [(sum(sums[i : i + size]), sum(counts[i : i + size])) for i in range(0, len(sums), size)]
    means = [total / count for total, count in batches if count]
    return sum(means) / len(means)
