"""Tests whether two sets of paired curves differ anywhere, with an exact rate of false alarms.

The same seeds are run before and after a change, so each seed gives a whole curve of differences. If the change has no
systematic effect, a seed's differences are as likely with the opposite sign; the signs of whole seeds are therefore
flipped in all possible ways, and the largest statistic over all figures and steps is compared with its values under
the flips. One test covers the whole curve, whatever the correlation between its points, and nothing is assumed about
the distribution.

Source: Winkler et al., "Permutation inference for the general linear model", NeuroImage 92 (2014): sign-flipping of
    exchangeable blocks with the maximum statistic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_SEEDS, MAX_SEEDS = 5, 14  # below, the smallest level is 1 in 8 and means little; above, 2^S flips take long
LEVEL = 1 / 128  # what eight seeds can reach: two of 256 flips show a statistic as large as one that no flip exceeds


@dataclass(frozen=True)
class FlipTest:
    """The result of the test.

    Args:
        p: The share of flips whose largest statistic is at least that of the data.
        level: The rate of false alarms.
        significant_P: True at the points whose statistic is larger than the level allows by chance.
        mean_P: The mean difference over the seeds.
    """

    p: float
    level: float
    significant_P: np.ndarray
    mean_P: np.ndarray


def level_of(num_seeds: int) -> float:
    """The rate of false alarms with a number of seeds: 1/128, or the smallest that fewer than eight seeds can reach."""
    return max(LEVEL, 2.0 ** (1 - num_seeds))


def flip_test(differences_SP: np.ndarray, smallest_effect: float) -> FlipTest:
    """Test whether the mean of paired differences is zero at all points.

    Args:
        differences_SP: The differences of S seeds at P points, all finite.
        smallest_effect: The size below which a difference does not matter: it weighs less in the statistic then.
    Returns:
        The result. The statistic of a point is the size of its mean over the root of its mean square, to whose square
        ``smallest_effect`` is added; the root does not change when signs are flipped, so the test stays exact.
    Raises:
        ValueError: If there are too few or too many seeds.
    """
    num_seeds = len(differences_SP)
    if not MIN_SEEDS <= num_seeds <= MAX_SEEDS:
        raise ValueError(f"{num_seeds} seeds; the test takes {MIN_SEEDS} to {MAX_SEEDS}")
    spread_P = np.sqrt((differences_SP**2).mean(0) + smallest_effect**2)
    scaled_SP = differences_SP / spread_P
    bits = np.arange(2**num_seeds)[:, None] >> np.arange(num_seeds)
    flips_FS = 1.0 - 2.0 * (bits & 1)
    largest_F = np.abs(flips_FS @ scaled_SP / num_seeds).max(1, initial=0.0)
    statistic_P = np.abs(scaled_SP.mean(0))
    level = level_of(num_seeds)
    # as many flips as the level allows may reach a significant statistic; rounding makes no flip smaller than its twin
    limit = np.sort(largest_F)[::-1][round(level * len(largest_F))] * (1 + 1e-9)
    observed = statistic_P.max(initial=0.0)
    p = float((largest_F >= observed * (1 - 1e-9)).mean())
    return FlipTest(p, level, (statistic_P > limit) & (statistic_P > 0), differences_SP.mean(0))
