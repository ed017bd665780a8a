"""The test of paired curves: exact rate of false alarms, and power where an effect is systematic."""

import numpy as np
import pytest

from glm4ft.testing.baseline.sign_flips import LEVEL, flip_test, level_of

SMALLEST = 1e-3
POINTS = 40


def is_alarm(differences_SP):
    return bool(flip_test(differences_SP, SMALLEST).significant_P.any())


@pytest.mark.parametrize("num_seeds", [6, 8, 10])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "whole curves shifted"])
def test_rate_of_false_alarms_is_at_most_the_stated_one(num_seeds, kind):
    random, count = np.random.default_rng(num_seeds), 2000
    alarms = 0
    for _ in range(count):
        noise = (
            random.standard_t(1, (num_seeds, POINTS))
            if kind == "heavy tails"
            else random.normal(size=(num_seeds, POINTS))
        )
        if kind == "whole curves shifted":
            noise = 0.1 * noise + random.standard_normal((num_seeds, 1))
        alarms += is_alarm(0.1 * noise)
    level = level_of(num_seeds)
    # four standard deviations of a binomial share above the level
    assert alarms / count <= level + 4 * (level * (1 - level) / count) ** 0.5


def test_a_systematic_effect_at_one_point_is_found_and_named():
    random = np.random.default_rng(0)
    differences = 1e-3 * random.normal(size=(8, POINTS))
    differences[:, 17] += 0.02
    test = flip_test(differences, SMALLEST)
    assert test.significant_P.nonzero()[0].tolist() == [17]
    assert test.p == LEVEL
    assert test.mean_P[17] == pytest.approx(0.02, abs=2e-3)


def test_rounding_with_one_sign_does_not_drown_an_effect():
    differences = np.full((8, POINTS), 1e-7)
    differences[:, 3] = np.linspace(0.01, 0.05, 8)
    assert flip_test(differences, SMALLEST).significant_P.nonzero()[0].tolist() == [3]


def test_equal_curves_are_no_alarm():
    test = flip_test(np.zeros((8, POINTS)), SMALLEST)
    assert not test.significant_P.any()
    assert test.p == 1.0


def test_one_seed_of_another_sign_is_not_systematic():
    differences = np.full((8, POINTS), 0.02)
    differences[0] = -0.02
    assert not is_alarm(differences)


@pytest.mark.parametrize("num_seeds", [4, 15])
def test_numbers_of_seeds_that_say_nothing_are_refused(num_seeds):
    with pytest.raises(ValueError, match=f"{num_seeds} seeds"):
        flip_test(np.zeros((num_seeds, 1)), SMALLEST)
