"""Intervals against SciPy's own, the sample ratio, and what peeking does: an A/A that is looked at 20 times."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from service.experiments.statistics import (
    MIN_UNITS,
    Sample,
    adjusted,
    anytime_multiple,
    anytime_p,
    difference,
    mean_by_unit,
    sample_ratio_p,
)

UNITS, PEEKS, REPEATS = 2000, 20, 500
FEWER = 200
"""Where 500 were repeated at another rate."""


def sample(values, units=None) -> Sample:
    return Sample(list(values), list(units) if units is not None else [f"u{index}" for index in range(len(values))])


def requests_of(
    generator: np.random.Generator, units: int, rate: float, *, first: int, most: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Each unit asks one to `most` times, and what befalls it befalls most of its requests."""
    asked = generator.integers(1, most + 1, units)
    unlucky = generator.beta(0.5 * rate / (1 - rate), 0.5, units)
    owners = np.repeat(np.arange(units), asked)
    return (generator.random(len(owners)) < unlucky[owners]).astype(float), first + owners


def alarms(rate: float, other: float, *, repeats: int, peeks: int, seed: int) -> tuple[int, int]:
    """Experiments that were told apart at any of so many looks: by the anytime-valid interval, and by the usual one."""
    generator, anytime, once = np.random.default_rng(seed), 0, 0
    for _ in range(repeats):
        arms = [requests_of(generator, UNITS // 2, p, first=first) for p, first in ((rate, 0), (other, UNITS))]
        seen_anytime = seen_once = False
        for peek in range(1, peeks + 1):
            until = UNITS // 2 * peek // peeks
            counts = [int(np.searchsorted(owners, owners[0] + until)) for _, owners in arms]
            looked = [
                Sample(values[:count].tolist(), owners[:count].tolist())
                for (values, owners), count in zip(arms, counts, strict=True)
            ]
            found = difference(*looked)
            seen_anytime |= found.shown
            low, high = found.once.low, found.once.high
            seen_once |= low is not None and high is not None and (low > 0 or high < 0)
        anytime, once = anytime + seen_anytime, once + seen_once
    return anytime, once


def test_one_request_a_unit_is_the_usual_interval() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.normal(1, 2, 400), generator.normal(1.5, 2, 300)
    assert mean_by_unit(sample(one)).low == pytest.approx(np.mean(one) - 1.96 * stats.sem(one), abs=2e-3)
    found = difference(sample(one), sample(other, [f"v{index}" for index in range(300)]))
    error = math.hypot(stats.sem(one), stats.sem(other))
    assert found.once.value == pytest.approx(np.mean(other) - np.mean(one))
    assert found.once.high == pytest.approx(found.once.value + 1.96 * error, abs=2e-3)
    assert found.anytime.high is not None
    assert found.once.high is not None
    assert found.anytime.high > found.once.high


def test_requests_of_one_unit_are_not_counted_as_many() -> None:
    generator = np.random.default_rng(1)
    by_unit = generator.normal(0, 1, 100)
    alone = mean_by_unit(sample(by_unit))
    repeated = mean_by_unit(sample(np.repeat(by_unit, 10), np.repeat([f"u{index}" for index in range(100)], 10)))
    assert alone.high is not None
    assert repeated.high is not None
    assert repeated.high - repeated.value == pytest.approx(alone.high - alone.value, rel=0.02)


def test_a_unit_in_both_arms_is_one_cluster() -> None:
    generator = np.random.default_rng(2)
    alike = generator.normal(0, 1, 200)
    units = [f"u{index}" for index in range(200)]
    found = difference(sample(alike, units), sample(alike + 0.1, units))
    assert found.units == 200
    assert found.shown, "the same units with a constant added: nothing is uncertain"


def test_the_multiple_is_the_papers_and_narrows_slowly() -> None:
    # written out once more, from Theorem 2.2 with t = n* = 1000 and alpha = .05
    rho2 = (-2 * math.log(0.05) + math.log(-2 * math.log(0.05) + 1)) / 1000
    bound = math.sqrt(2 * (1000 * rho2 + 1) / (1000**2 * rho2) * math.log(math.sqrt(1000 * rho2 + 1) / 0.05))
    assert anytime_multiple(1000) == pytest.approx(bound * math.sqrt(1000))
    assert 2.8 < anytime_multiple(1000) < 3.2
    assert anytime_multiple(100) > anytime_multiple(1000) > 1.96
    assert anytime_multiple(1_000_000) > anytime_multiple(1000)


def test_p_says_what_the_interval_says() -> None:
    for units in (100, 1000, 30_000):
        multiple = anytime_multiple(units)
        assert anytime_p(multiple, 1, units) == pytest.approx(0.05)
        assert anytime_p(1.01 * multiple, 1, units) < 0.05 < anytime_p(0.99 * multiple, 1, units)
    assert (anytime_p(0, 1, 100), anytime_p(1, 0, 100), anytime_p(0, 0, 100)) == (1, 0, 1)


def test_holm_by_hand() -> None:
    assert adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjusted([]) == []


@pytest.mark.parametrize(
    ("units", "shares", "red"),
    [
        ({"a": 1000, "b": 1010}, {"a": 0.5, "b": 0.5}, False),
        ({"a": 1000, "b": 1200}, {"a": 0.5, "b": 0.5}, True),
        ({"a": 900, "b": 100}, {"a": 0.9, "b": 0.1}, False),
        ({"a": 500, "b": 500}, {"a": 0.9, "b": 0.1}, True),
        ({"a": 500}, {"a": 0.5}, True),  # the other half was never seen
        ({}, {"a": 0.5, "b": 0.5}, False),
    ],
)
def test_the_sample_ratio(units: dict, shares: dict, red: bool) -> None:
    p = sample_ratio_p(units, shares)
    assert (p < 0.001) == red
    if set(units) == set(shares) and sum(shares.values()) == 1:
        total = sum(units.values())
        assert p == pytest.approx(stats.chisquare(list(units.values()), [total * one for one in shares.values()])[1])


def test_few_units_have_no_verdict() -> None:
    few = MIN_UNITS - 1
    found = difference(sample([0.0] * few), sample([1.0] * few, [f"v{index}" for index in range(few)]))
    assert found.anytime.low is None
    assert not found.shown
    assert mean_by_unit(sample([])).low is None


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "repeats"), [(0.05, REPEATS), (0.3, FEWER)])
def test_peeking_raises_no_false_alarm(rate: float, repeats: int) -> None:
    """An A/A is repeated and looked at 20 times each: the usual interval is fooled, ours is not."""
    anytime, once = alarms(rate, rate, repeats=repeats, peeks=PEEKS, seed=int(rate * 100))
    print(f"A/A at {rate}: {anytime}/{repeats} false alarms, {once}/{repeats} with the interval for one look")
    assert anytime <= 0.05 * repeats
    assert once > 0.1 * repeats, "the test would see it"


@pytest.fixture
def few_objects() -> Iterator[None]:
    """Statsmodels collects garbage at each adjustment: it goes through what is new."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_objects")
def test_peeking_at_nine_measures_raises_no_false_alarm() -> None:
    """Of 500 A/A experiments at 20 looks: any of nine measures told apart, adjusted and each for itself. One request a
    unit, so that means and errors are the usual ones."""
    generator, of_all, each = np.random.default_rng(9), 0, 0
    looks = np.linspace(UNITS // 2 // PEEKS, UNITS // 2, PEEKS).astype(int)
    for _ in range(REPEATS):
        pairs = generator.normal(size=(9, UNITS // 2)) - generator.normal(size=(9, UNITS // 2))
        means = pairs.cumsum(axis=1)[:, looks - 1] / looks
        variances = ((pairs**2).cumsum(axis=1)[:, looks - 1] - looks * means**2) / (looks - 1)
        errors = np.sqrt(variances / looks)
        by_look = [
            [anytime_p(abs(m), e, 2 * int(until)) for m, e in zip(mean, error, strict=True)]
            for mean, error, until in zip(means.T, errors.T, looks, strict=True)
        ]
        ps = min(by_look, key=min)  # what is smallest is so adjusted, too
        each += min(ps) <= 0.05
        of_all += min(adjusted(ps)) <= 0.05
    print(f"A/A of nine measures: {of_all}/{REPEATS} false alarms, {each}/{REPEATS} with each for itself")
    assert of_all <= 0.05 * REPEATS
    assert each > of_all, "the test would see it"


def units_for(points: float, rate: float) -> int:
    """Units of both arms together, one request each and halves, at which a difference of `points` from a `rate` is
    shown with a power of 80 % at a look there, anytime-valid. `points` and `rate` are shares, 0 to 1."""
    spread = 2 * (rate * (1 - rate) + (rate + points) * (1 - rate - points))
    units = 2 * MIN_UNITS
    while abs(points) * math.sqrt(units / spread) < anytime_multiple(units) + stats.norm.ppf(0.8):
        units = math.ceil(units * 1.01)
    return units


@pytest.mark.slow
def test_the_power_is_stated_for_three_points_at_two_thousand_units() -> None:
    """A rate of 2 % against 5 %."""
    found, _ = alarms(0.02, 0.05, repeats=100, peeks=1, seed=5)
    print(f"2 % against 5 % at {UNITS} units: seen in {found} of 100")
    assert found > 30
    assert units_for(0.03, 0.02) == pytest.approx(units_for(-0.03, 0.05), rel=0.02)
