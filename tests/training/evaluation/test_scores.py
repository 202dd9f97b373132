"""Scores and tables from measurements of which some have captions only, or one POPE split only."""

from __future__ import annotations

import pytest

from tests.training.made_up import answered, board, captioned
from training.evaluation.measuring import answers_key
from training.evaluation.table import caption_table, question_table


def test_one_split_gives_its_scores_and_its_table():
    scored = board(plain=answered(0.5), steered=answered(0.8))
    scores = scored.scores("steered")
    assert set(scores.as_json()) == {"pope"}
    assert set(scores.as_json()["pope"]) == {"adversarial"}
    assert scores.pope["adversarial"]["accuracy"].value == pytest.approx(0.8)
    change = scored.difference("steered", "plain").pope["adversarial"]["accuracy"]
    assert change.value == pytest.approx(0.3)
    assert change.above(0.15)
    table = question_table({"plain": scored.scores("plain"), "steered": scores}).splitlines()
    assert [line.split()[:2] for line in table[2:]] == [["plain", "adversarial"], ["steered", "adversarial"]]


def test_second_turns_stand_beside_first_ones():
    second = answers_key("random", "second")
    scored = board(
        plain=answered(0.9, "random") | answered(0.9, second), default=answered(0.9, "random") | answered(0.5, second)
    )
    report = scored.difference("default", "plain").as_json()
    assert set(report) == {"pope", "pope_second_turn"}
    assert report["pope"]["random"]["accuracy"] == {"value": 0, "low": 0, "high": 0}
    assert report["pope_second_turn"]["random"]["accuracy"]["value"] == pytest.approx(-0.4)
    lines = question_table({"plain": scored.scores("plain")}).splitlines()
    assert "random, second turn" in lines[3]


def test_captions_alone_have_no_questions():
    scored = board(plain=captioned(0.6), steered=captioned(0.2), other_image=captioned(0.6))
    assert set(scored.scores("plain").as_json()) >= {"chair_s", "chair_i", "recall", "length"}
    assert "pope" not in scored.scores("plain").as_json()
    assert scored.scores("plain").chair["chair_i"].value == pytest.approx(0.6 / 2.6)
    assert "0.600" in caption_table({"plain": scored.scores("plain")})


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
