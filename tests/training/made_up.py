"""Measurements that nobody made: counts of captions and of answers whose scores are known beforehand."""

from __future__ import annotations

import numpy as np

from training import chair, pope
from training.evaluation.measuring import Measurement
from training.evaluation.scores import Scoreboard

SCENES = 200


def board(**counts: dict[str, np.ndarray]) -> Scoreboard:
    """By condition, counts as in `Measurement.counts`."""
    return Scoreboard(
        {name: Measurement(counts=each, captions=[], receipts={}, seconds=0.0) for name, each in counts.items()},
        seed=0,
        resamples=400,
    )


def answered(rightly: float, key: str = "adversarial") -> dict[str, np.ndarray]:
    """One question a scene about an absent object, of which a share is answered rightly."""
    rows = [pope.count_answer(number >= rightly * SCENES, False) for number in range(SCENES)]
    return {key: pope.counts_matrix(rows, range(SCENES), number_of_scenes=SCENES)}


def captioned(
    invented: float, *, both_named: float = 1.0, repeating: float = 0.0, captions: int = SCENES
) -> dict[str, np.ndarray]:
    """Captions of two true objects: a share names an invented one, a share names both true ones, the others one; a
    share names the first one again."""
    truth = ["dog", "cat"]
    rows = [
        chair.count_caption(
            "some words here",
            truth[: 1 + (number < both_named * captions)]
            + ["cup"] * (number < invented * captions)
            + ["dog"] * (number < repeating * captions),
            set(truth),
        )
        for number in range(captions)
    ]
    return {"captions": chair.counts_matrix(rows)}
