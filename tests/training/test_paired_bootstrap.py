"""Intervals cover what they should, and pairing takes away what conditions share."""

import numpy as np
import pytest

from training.evaluation.paired_bootstrap import Interval, draw_scenes, intervals, paired_differences, ratio


def mean(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Counts are (sum, number)."""
    return {"mean": ratio(sums[..., 0], sums[..., 1])}


def scenes(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones_like(values)], axis=1)


def test_a_condition_minus_itself_is_exactly_zero():
    values = scenes(np.random.default_rng(0).random(50))
    assert paired_differences(mean, values, values.copy(), draw_scenes(50))["mean"] == Interval(0.0, 0.0, 0.0)


def test_a_constant_difference_has_no_spread_however_much_scenes_differ():
    values = np.random.default_rng(0).normal(size=50) * 100
    found = paired_differences(mean, scenes(values + 1), scenes(values), draw_scenes(50))["mean"]
    assert found == pytest.approx((1, 1, 1))


def test_every_resample_draws_as_many_scenes_as_there_are():
    weights = draw_scenes(7, resamples=100, seed=3)
    assert weights.shape == (100, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert (weights == draw_scenes(7, resamples=100, seed=3)).all()


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        sample = generator.binomial(1, 0.4, size=150).astype(float)
        found = intervals(mean, scenes(sample), draw_scenes(150, resamples=400, seed=trial))["mean"]
        covered += found.low <= 0.4 <= found.high
    assert 0.90 <= covered / 300 <= 0.985


def test_the_width_is_that_of_the_normal_approximation():
    sample = np.random.default_rng(2).normal(size=1000)
    found = intervals(mean, scenes(sample), draw_scenes(1000))["mean"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * sample.std() / 1000**0.5, rel=0.1)


def test_other_scenes_cannot_be_paired():
    with pytest.raises(ValueError, match="same scenes"):
        paired_differences(mean, scenes(np.ones(3)), scenes(np.ones(4)), draw_scenes(3))


def test_a_ratio_over_nothing_is_zero():
    assert ratio(np.array([1.0, 2.0]), np.array([0.0, 4.0])).tolist() == [0, 0.5]


@pytest.mark.parametrize(("interval", "sides"), [((-2, -3, -1), (True, False)), ((1, 0, 2), (False, False))])
def test_a_side_is_taken_only_by_the_whole_interval(interval: tuple, sides: tuple):
    assert (Interval(*interval).below(), Interval(*interval).above()) == sides
