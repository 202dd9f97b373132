"""What may be said of two arms, and when. Pure numbers: no log, no service. SciPy and statsmodels are imported on use.

Requests of one unit are alike, so errors are clustered by unit. An experiment is looked at again and again, so a
verdict needs the anytime-valid interval: the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy
and Ramdas ("Time-uniform central limit theory and asymptotic confidence sequences", Theorem 2.2), which holds at every
look at once. It is the usual interval with a wider multiple of the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

ALPHA = 0.05
RED_BELOW = 0.001
"""A sample ratio that is as unlikely as this means that the comparison is broken, not that chance was unkind."""
TUNED_FOR_UNITS = 1000
"""The number of units at which the anytime-valid interval is narrowest for its kind; it holds at any number."""
ROUNDING = 1e-9
"""Of the means: two that differ by less differ by how they were added up."""
MIN_UNITS = 50
"""In either arm: what is asymptotic says nothing about fewer."""


class Interval(NamedTuple):
    """An estimate between its bounds; None where they cannot be known."""

    value: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """Arm minus default arm."""

    once: Interval
    """95 %, for a single look that was planned."""
    anytime: Interval
    """95 %, for all looks together."""
    units: int
    """Of both arms."""
    p: float | None = None
    """Anytime-valid: of no true difference, it is ever below P in at most a share P of experiments. None: unknown."""

    @property
    def shown(self) -> bool:
        """Whether the anytime-valid interval leaves out 0: of this measure, looked at alone."""
        low, high = self.anytime.low, self.anytime.high
        return low is not None and high is not None and (low > 0 or high < 0)


class Sample(NamedTuple):
    """One measure in one arm: a value for each request, and whose request it was."""

    values: Sequence[float]
    units: Sequence[str] | Sequence[int]


def sample_ratio_p(units: Mapping[str, int], shares: Mapping[str, float]) -> float:
    """Chi-square p of units by arm against the shares; arms without any units count. 1 where there is nothing to test.

    Shares that sum to less than 1 leave the rest to arms that nobody has seen.
    """
    from scipy.stats import chisquare

    missing = 1 - math.fsum(shares.values())
    expected = [*shares.values(), *([missing] if missing > 1e-6 else [])]
    observed = [units.get(arm, 0) for arm in shares] + [0] * (len(expected) - len(shares))
    total = sum(observed)
    if total == 0 or len(expected) < 2:
        return 1.0
    scale = total / math.fsum(expected)
    return float(chisquare(observed, [scale * share for share in expected]).pvalue)


def mean_by_unit(sample: Sample, alpha: float = ALPHA) -> Interval:
    """Mean over requests, with an interval clustered by unit for a single look."""
    if not sample.values:
        return Interval(math.nan, None, None)
    (value,), covariance = _clustered([sample])
    return _around(value, _normal(alpha) * math.sqrt(covariance[0][0]) if len(set(sample.units)) > 1 else None)


def difference(default: Sample, arm: Sample, *, alpha: float = ALPHA) -> Difference:
    """Of one measure in one arm, as if there were no others: `adjusted` sees to those."""
    units = len(set(default.units) | set(arm.units))
    few = min(len(set(default.units)), len(set(arm.units)))
    if few < 2:
        nothing = Interval(math.nan, None, None)
        return Difference(nothing, nothing, units)
    (base, value), covariance = _clustered([default, arm])
    error = math.sqrt(max(0.0, covariance[0][0] + covariance[1][1] - 2 * covariance[0][1]))
    rounding = ROUNDING * (abs(base) + abs(value))
    once = _around(value - base, _normal(alpha) * error + rounding)
    if few < MIN_UNITS:
        return Difference(once, _around(value - base, None), units)
    anytime = _around(value - base, anytime_multiple(units, alpha) * error + rounding)
    return Difference(once, anytime, units, anytime_p(max(0.0, abs(value - base) - rounding), error, units))


def anytime_p(distance: float, error: float, units: int) -> float:
    """The smallest alpha, tuned as for ALPHA, whose anytime-valid interval leaves out 0; at most 1."""
    if distance == 0:
        return 1.0
    if error == 0:
        return 0.0
    rho2 = _rho2(ALPHA, TUNED_FOR_UNITS)
    spread = units * rho2 + 1
    return min(1.0, math.sqrt(spread) * math.exp(-((distance / error) ** 2) * units * rho2 / (2 * spread)))


def adjusted(ps: Sequence[float]) -> list[float]:
    """Holm's, of all comparisons that one looks at: one of them below ALPHA by chance, at any look, in at most ALPHA of
    experiments, as each p is anytime-valid."""
    from statsmodels.stats.multitest import multipletests

    return np.asarray(multipletests(ps, method="holm")[1]).tolist() if ps else []


def anytime_multiple(units: int, alpha: float = ALPHA, tuned_for: int = TUNED_FOR_UNITS) -> float:
    """Standard errors that an interval needs on either side to hold at every number of units at once."""
    rho2 = _rho2(alpha, tuned_for)
    spread = units * rho2 + 1
    return math.sqrt(2 * spread / (units * rho2) * math.log(math.sqrt(spread) / alpha))


def _rho2(alpha: float, tuned_for: int) -> float:
    log = -2 * math.log(alpha)
    return (log + math.log(log + 1)) / tuned_for


def _clustered(samples: Sequence[Sample]) -> tuple[list[float], np.ndarray]:
    """Means of the samples, and their covariance; a unit in two of them is one cluster."""
    from statsmodels.regression.linear_model import OLS

    values = np.concatenate([np.asarray(sample.values, dtype=float) for sample in samples])
    arms = np.zeros((len(values), len(samples)))
    start = 0
    for index, sample in enumerate(samples):
        arms[start : start + len(sample.values), index] = 1
        start += len(sample.values)
    _, groups = np.unique([unit for sample in samples for unit in sample.units], return_inverse=True)
    if groups.max() == 0:
        return [float(np.mean(sample.values)) for sample in samples], np.zeros((len(samples), len(samples)))
    fitted = OLS(values, arms).fit(cov_type="cluster", cov_kwds={"groups": groups})
    return [float(value) for value in fitted.params], np.asarray(fitted.cov_params())


def _normal(alpha: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(1 - alpha / 2))


def _around(value: float, half: float | None) -> Interval:
    return Interval(value, None, None) if half is None else Interval(value, value - half, value + half)
