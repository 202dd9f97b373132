"""Scores, tables and sentences from measurements of which some have captions only, or one POPE split only."""

from __future__ import annotations

import numpy as np
import pytest

from training import chair, pope
from training.evaluation.measuring import Measurement
from training.evaluation.scores import Scoreboard
from training.evaluation.table import caption_table, question_table
from training.evaluation.verdict import NOT_ALIGNMENT, verdict

SCENES = 200


def answered(rightly: float, split: str = "adversarial") -> dict[str, np.ndarray]:
    """One question a scene about an absent object, of which a share is answered rightly."""
    rows = [pope.count_answer(number >= rightly * SCENES, False) for number in range(SCENES)]
    return {split: pope.counts_matrix(rows, range(SCENES), number_of_scenes=SCENES)}


def captioned(invented: float, *, named: int = 2) -> dict[str, np.ndarray]:
    """Captions that name `named` of two true objects, a share of them an invented one too."""
    truth = ["dog", "cat"]
    rows = [
        chair.count_caption("some words here", truth[:named] + ["cup"] * (number < invented * SCENES), set(truth))
        for number in range(SCENES)
    ]
    return {"captions": chair.counts_matrix(rows)}


def board(**counts: dict[str, np.ndarray]) -> Scoreboard:
    measurements = {
        name: Measurement(counts=matrices, captions=[], receipts={}, seconds=0.0) for name, matrices in counts.items()
    }
    return Scoreboard(measurements, seed=0, resamples=200)


def test_one_split_gives_its_scores_its_table_and_its_sentences():
    scored = board(plain=answered(0.5), steered=answered(0.8), default=answered(0.5), other_image=answered(0.8))
    scores = scored.scores("steered")
    assert set(scores.as_json()) == {"pope"}
    assert set(scores.as_json()["pope"]) == {"adversarial"}
    assert scores.pope["adversarial"]["accuracy"].value == pytest.approx(0.8)
    change = scored.difference("steered", "plain").pope["adversarial"]["accuracy"]
    assert change.value == pytest.approx(0.3)
    assert change.above(0.15)
    table = question_table({"plain": scored.scores("plain"), "steered": scores}).splitlines()
    assert [line.split()[:2] for line in table[2:]] == [["plain", "adversarial"], ["steered", "adversarial"]]
    told = verdict(scored)
    assert any(line.startswith("steered, adversarial questions: accuracy better") for line in told)
    assert any("is NOT beyond other_image" in line and NOT_ALIGNMENT in line for line in told)
    assert any(line.startswith("default: no POPE split is worse") for line in told)


def test_a_split_without_adversarial_has_no_sentence_about_it():
    counts = {name: answered(share, "random") for name, share in (("plain", 0.8), ("steered", 0.5), ("default", 0.5))}
    told = verdict(board(**counts))
    assert any(line.startswith("default: HARMS questions") for line in told)
    assert any(line.startswith("steered, random questions: accuracy WORSE") for line in told)
    assert not any("adversarial" in line for line in told)


def test_captions_alone_have_no_questions():
    scored = board(plain=captioned(0.6), steered=captioned(0.2), other_image=captioned(0.6))
    assert set(scored.scores("plain").as_json()) >= {"chair_s", "chair_i", "recall", "length"}
    assert "pope" not in scored.scores("plain").as_json()
    assert scored.scores("plain").chair["chair_i"].value == pytest.approx(0.6 / 2.6)
    told = verdict(scored)
    assert any("lowers CHAIR_s from 0.600 to 0.200" in line for line in told)
    assert any(line.startswith("other_image: does not lower CHAIR_s") for line in told)
    assert "0.600" in caption_table({"plain": scored.scores("plain")})


def test_lost_objects_are_told():
    told = verdict(board(plain=captioned(0.6), steered=captioned(0.0, named=1)))
    assert any("MORE THAN the allowed drop" in line for line in told)


def test_nothing_is_said_without_plain():
    assert verdict(board(steered=captioned(0.1))) == ["Nothing can be said without the condition plain."]


def test_pairs_are_those_that_were_run():
    measured = {name: captioned(0.5) for name in ("plain", "steered", "union", "other_image")}
    assert board(**measured).pairs() == [
        ("steered", "plain"),
        ("union", "plain"),
        ("other_image", "plain"),
        ("steered", "other_image"),
        ("steered", "union"),
        ("union", "other_image"),
    ]
