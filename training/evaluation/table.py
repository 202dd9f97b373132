"""Scores as tables for a terminal; plain text, so that they can be pasted into a page. Knows scores only."""

from __future__ import annotations

from collections.abc import Mapping

from training.evaluation.paired_bootstrap import Interval
from training.evaluation.scores import Scores

CHAIR_COLUMNS = ("chair_s", "chair_i", "recall", "length", "objects", "repeated", "empty")
POPE_COLUMNS = ("accuracy", "precision", "recall", "f1", "yes_rate")


def caption_table(scores: Mapping[str, Scores]) -> str:
    """CHAIR by condition, each with its interval."""
    header = ["captions", *CHAIR_COLUMNS]
    rows = [[name, *(_cell(row.chair[column]) for column in CHAIR_COLUMNS)] for name, row in scores.items()]
    return _align([header, *rows])


def question_table(scores: Mapping[str, Scores]) -> str:
    """POPE by condition, split and turn; the interval is given for the accuracy."""
    header = ["questions", "split", *POPE_COLUMNS]
    rows = [
        [
            name if number == 0 else "",
            split,
            _cell(metrics["accuracy"]),
            *(f"{metrics[column].value:.3f}" for column in POPE_COLUMNS[1:]),
        ]
        for name, row in scores.items()
        for number, (split, metrics) in enumerate(row.questions.items())
    ]
    return _align([header, *rows])


def _cell(interval: Interval) -> str:
    digits = 1 if abs(interval.value) >= 10 else 3
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
