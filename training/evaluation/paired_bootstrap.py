"""Intervals by resampling scenes. Knows only matrices of counts: no captions, no questions, no model.

Every benchmark here is a ratio of sums, so a scene is a row of counts and a metric is a function of summed rows. One
set of weights (how often each scene was drawn) is used for all conditions: a difference is then *paired*, that is taken
within each resample, and what scenes have in common cancels. All questions about a scene are drawn together.

Letters: R resamples, N scenes, C counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

Metrics = Callable[[np.ndarray], dict[str, np.ndarray]]
"""From summed counts [..., C] to named metrics [...]."""


class Interval(NamedTuple):
    """A number with its two-sided percentile interval."""

    value: float
    """The metric over all scenes, not the mean of the resamples."""
    low: float
    high: float

    def below(self, bound: float = 0.0) -> bool:
        """True where the whole interval lies below `bound`."""
        return self.high < bound

    def above(self, bound: float = 0.0) -> bool:
        """True where the whole interval lies above `bound`."""
        return self.low > bound

    def negated(self) -> Interval:
        """The same change where less is better."""
        return Interval(-self.value, -self.high, -self.low)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, and 0 where the denominator is 0 (no mention, no 'yes' at all)."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=np.asarray(denominator) != 0)


@lru_cache(maxsize=2)  # the splits and turns of a benchmark have equally many scenes
def draw_scenes(scenes: int, *, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each scene is drawn in each resample, [R, N], not to be written to; each row sums to N."""
    if scenes < 1:
        raise ValueError("a bootstrap needs at least one scene")
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(scenes, np.full(scenes, 1 / scenes), size=resamples).astype(np.float64)
    drawn.flags.writeable = False
    return drawn


def intervals(metrics: Metrics, counts_NC: np.ndarray, weights_RN: np.ndarray, *, level: float = 0.95):
    """Each metric over all scenes with its interval."""
    return _summarise(metrics(counts_NC.sum(axis=0)), metrics(weights_RN @ counts_NC), level)


def paired_differences(
    metrics: Metrics, first_NC: np.ndarray, second_NC: np.ndarray, weights_RN: np.ndarray, *, level: float = 0.95
) -> dict[str, Interval]:
    """Each metric of `first` minus that of `second`; row i of both is the same scene."""
    if first_NC.shape != second_NC.shape:
        raise ValueError(f"paired conditions need the same scenes: {first_NC.shape} is not {second_NC.shape}")
    whole = _subtract(metrics(first_NC.sum(axis=0)), metrics(second_NC.sum(axis=0)))
    resampled = _subtract(metrics(weights_RN @ first_NC), metrics(weights_RN @ second_NC))
    return _summarise(whole, resampled, level)


def _subtract(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: first[name] - second[name] for name in first}


def _summarise(whole: dict[str, np.ndarray], resampled: dict[str, np.ndarray], level: float) -> dict[str, Interval]:
    tail = (1 - level) / 2
    return {
        name: Interval(float(whole[name]), *(float(q) for q in np.quantile(values, [tail, 1 - tail])))
        for name, values in resampled.items()
    }
