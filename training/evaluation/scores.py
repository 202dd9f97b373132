"""Measurements of several conditions as numbers with intervals, and the paired differences between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.chair import chair_metrics
from training.evaluation.benchmark import TURNS, Turn
from training.evaluation.conditions import CONTROLS, FORMS
from training.evaluation.measuring import Measurement, answers_key
from training.evaluation.paired_bootstrap import Interval, Metrics, draw_scenes, intervals, paired_differences
from training.pope import SPLITS, Split, pope_metrics

RESAMPLES = 2000
BySplit = Mapping[Split, Mapping[str, Interval]]
"""POPE's metrics."""


def is_zero(change: Mapping[str, Interval]) -> bool:
    """Whether a difference is none at all, in no metric and no resample: no answer that counts was changed."""
    return all(interval == (0, 0, 0) for interval in change.values())


def as_field(asked: str) -> str:
    """A key of `Scores.questions` where it is part of a name: adversarial_second_turn."""
    return asked.replace(",", "").replace(" ", "_")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One condition, or one condition minus another; a benchmark of which nothing was asked has no metrics."""

    chair: Mapping[str, Interval]
    pope: BySplit
    """Of first turns."""
    pope_second_turn: BySplit

    @property
    def by_turn(self) -> dict[Turn, BySplit]:
        """POPE in the turns in which questions were asked."""
        found: dict[Turn, BySplit] = {"first": self.pope, "second": self.pope_second_turn}
        return {turn: by_split for turn, by_split in found.items() if by_split}

    @property
    def questions(self) -> dict[str, Mapping[str, Interval]]:
        """POPE by split and turn, as 'adversarial' and 'adversarial, second turn'."""
        return {
            answers_key(split, turn): metrics
            for turn, by_split in self.by_turn.items()
            for split, metrics in by_split.items()
        }

    def as_json(self) -> dict[str, Any]:
        """`chair_s`, ..., `pope.<split>.<metric>`, `pope_second_turn.<split>.<metric>`: {"value", "low", "high"}."""
        pope = {"pope": self.pope, "pope_second_turn": self.pope_second_turn}
        return {name: value._asdict() for name, value in self.chair.items()} | {
            turn: {split: {name: value._asdict() for name, value in row.items()} for split, row in by_split.items()}
            for turn, by_split in pope.items()
            if by_split
        }


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
            {key: intervals(_metrics(key), counts[key], weights) for key, weights in self._weights.items()}
        )

    def difference(self, name: str, other: str) -> Scores:
        """Metrics of `name` minus those of `other`, paired by scene."""
        first, second = self._counts[name], self._counts[other]
        return _sorted_by_benchmark(
            {
                key: paired_differences(_metrics(key), first[key], second[key], weights)
                for key, weights in self._weights.items()
            }
        )

    def pairs(self) -> list[tuple[str, str]]:
        """The differences worth reporting: each condition to plain, and what is steered to each control and form."""
        pairs = [(name, "plain") for name in self._counts if name != "plain"]
        pairs += [("steered", other) for other in ("decoding_only", *CONTROLS, *FORMS)]
        pairs += [(form, control) for form in FORMS for control in CONTROLS]
        return [(first, second) for first, second in pairs if first in self and second in self]


def _metrics(benchmark: str) -> Metrics:
    """By benchmark, as in `Measurement.counts`."""
    return chair_metrics if benchmark == "captions" else pope_metrics


def _sorted_by_benchmark(by_benchmark: dict[str, dict[str, Interval]]) -> Scores:
    by_turn: list[BySplit] = [
        {split: by_benchmark[key] for split in SPLITS if (key := answers_key(split, turn)) in by_benchmark}
        for turn in TURNS
    ]
    return Scores(chair=by_benchmark.get("captions", {}), pope=by_turn[0], pope_second_turn=by_turn[1])
