"""POPE's questions and its metrics."""

from collections import Counter

import pytest

from training.pope import SPLITS, build_questions, count_answer, counts_matrix, pope_metrics

VOCABULARY = ("circle", "star", "square", "ring", "triangle", "cross")
SCENES = [{"circle", "square"}, {"circle", "triangle"}, {"circle", "star", "triangle"}, {"ring", "square"}]
PARTNERS = {"circle": "star", "square": "ring", "triangle": "cross"}


def chosen(split: str, **options) -> dict[int, str]:
    questions = build_questions(SCENES, VOCABULARY, seed=0, **options)
    return {question.scene: question.object for question in questions if question.split == split and not question.truth}


def test_each_split_is_balanced_and_true():
    questions = build_questions(SCENES, VOCABULARY, partners=PARTNERS, seed=1)
    assert Counter((question.split, question.truth) for question in questions) == {
        (split, truth): len(SCENES) for split in SPLITS for truth in (True, False)
    }
    assert all((question.object in SCENES[question.scene]) is question.truth for question in questions)


def test_splits_share_their_questions_about_present_objects():
    questions = build_questions(SCENES, VOCABULARY, partners=PARTNERS, seed=1)
    asked = {split: [(q.scene, q.object) for q in questions if q.split == split and q.truth] for split in SPLITS}
    assert asked["random"] == asked["popular"] == asked["adversarial"]


def test_popular_asks_for_the_most_frequent_absent_object():
    assert chosen("popular")[3] == "circle"  # in three scenes of four
    assert chosen("popular")[0] == "triangle"


def test_adversarial_asks_for_an_absent_partner():
    asked = chosen("adversarial", partners=PARTNERS)
    assert asked[0] in {"star", "ring"}
    assert asked[1] in {"star", "cross"}
    assert asked[2] == "cross"


def test_adversarial_without_partners_asks_for_the_most_frequent_companion():
    assert chosen("adversarial")[1] in {"star"}  # beside circle and triangle once each; square and ring never with both
    assert chosen("adversarial")[3] == "circle"  # beside the square


def test_more_scenes_leave_the_first_ones_alone_where_the_partners_decide():
    few = chosen("adversarial", partners=PARTNERS)
    more = build_questions([*SCENES, {"cross"}], VOCABULARY, partners=PARTNERS, seed=0)
    assert few == {q.scene: q.object for q in more if q.split == "adversarial" and not q.truth and q.scene < 4}


def test_a_scene_with_everything_is_refused():
    with pytest.raises(ValueError, match="scene 0 needs"):
        build_questions([set(VOCABULARY)], VOCABULARY, seed=0)


def test_metrics_by_hand():
    answers = [(True, True), (True, False), (None, True), (False, False), (False, True), (False, False)]
    matrix = counts_matrix([count_answer(*pair) for pair in answers], [0, 0, 1, 1, 2, 2], number_of_scenes=3)
    assert matrix[:, 0].tolist() == [2, 2, 2]
    scores = {name: float(value) for name, value in pope_metrics(matrix.sum(axis=0)).items()}
    assert scores == pytest.approx(
        {"accuracy": 3 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "yes_rate": 2 / 6, "unparsed": 1 / 6}
    )


def test_always_yes_has_perfect_recall_and_half_the_accuracy():
    rows = [count_answer(True, truth) for truth in (True, False) * 10]
    scores = pope_metrics(counts_matrix(rows, range(20), number_of_scenes=20).sum(axis=0))
    assert (scores["accuracy"], scores["recall"], scores["yes_rate"]) == (0.5, 1, 1)
