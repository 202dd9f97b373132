"""Measurements of several conditions as numbers with intervals, and the paired differences between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.chair import chair_metrics
from training.evaluation.conditions import CONTROLS, FORMS
from training.evaluation.measuring import Measurement
from training.evaluation.paired_bootstrap import Interval, Metrics, draw_scenes, intervals, paired_differences
from training.pope import SPLITS, pope_metrics

RESAMPLES = 2000
METRICS: dict[str, Metrics] = {"captions": chair_metrics} | dict.fromkeys(SPLITS, pope_metrics)
"""By benchmark, as in `Measurement.counts`."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One condition, or one condition minus another; a benchmark of which nothing was asked has no metrics."""

    chair: Mapping[str, Interval]
    pope: Mapping[str, Mapping[str, Interval]]
    """By split."""

    def as_json(self) -> dict[str, Any]:
        """`chair_s`, ... and `pope.<split>.<metric>`, each {"value", "low", "high"}."""
        pope = {split: {name: value._asdict() for name, value in self.pope[split].items()} for split in self.pope}
        return {name: value._asdict() for name, value in self.chair.items()} | ({"pope": pope} if pope else {})


class Scoreboard:
    """Scores from measurements of the same scenes. One draw of scenes serves all conditions, so they stay paired."""

    def __init__(self, measurements: Mapping[str, Measurement], *, seed: int, resamples: int = RESAMPLES) -> None:
        self._counts = {name: measured.counts for name, measured in measurements.items()}
        some = next(iter(self._counts.values()))
        self._weights = {
            benchmark: draw_scenes(len(matrix), resamples=resamples, seed=seed) for benchmark, matrix in some.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._counts

    def scores(self, name: str) -> Scores:
        """One condition's metrics."""
        counts = self._counts[name]
        return _sorted_by_benchmark(
            {key: intervals(METRICS[key], counts[key], weights) for key, weights in self._weights.items()}
        )

    def difference(self, name: str, other: str) -> Scores:
        """Metrics of `name` minus those of `other`, paired by scene."""
        first, second = self._counts[name], self._counts[other]
        return _sorted_by_benchmark(
            {
                key: paired_differences(METRICS[key], first[key], second[key], weights)
                for key, weights in self._weights.items()
            }
        )

    def pairs(self) -> list[tuple[str, str]]:
        """The differences worth reporting: each condition to plain, and what is steered to each control and form."""
        pairs = [(name, "plain") for name in self._counts if name != "plain"]
        pairs += [("steered", other) for other in ("decoding_only", *CONTROLS, *FORMS)]
        pairs += [(form, control) for form in FORMS for control in CONTROLS]
        return [(first, second) for first, second in pairs if first in self and second in self]


def _sorted_by_benchmark(by_benchmark: dict[str, dict[str, Interval]]) -> Scores:
    chair = by_benchmark.pop("captions", {})
    return Scores(chair=chair, pope=by_benchmark)
