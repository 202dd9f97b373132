"""CHAIR on captions whose scores can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.chair import chair_metrics, count_caption, counts_matrix
from training.miniature.language import shapes_mentioned


def scores_of(*captions: tuple[str, set[str]]) -> dict[str, float]:
    rows = [count_caption(caption, shapes_mentioned(caption), truth) for caption, truth in captions]
    return {name: float(value) for name, value in chair_metrics(counts_matrix(rows).sum(axis=0)).items()}


def test_hand_made_captions():
    scores = scores_of(
        ("There is a circle in red, a star in blue.", {"circle", "square"}),  # a star is invented, the square missing
        ("There is a ring in green, a ring in red.", {"ring"}),  # nothing invented; the ring is mentioned twice
    )
    assert scores["chair_s"] == pytest.approx(1 / 2)
    assert scores["chair_i"] == pytest.approx(1 / 4)
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["length"] == pytest.approx((10 + 10) / 2)
    assert scores["objects"] == pytest.approx(3 / 2)
    assert scores["invented"] == pytest.approx(1 / 2)
    assert scores["repeated"] == pytest.approx(1 / 2)
    assert scores["empty"] == 0


def test_an_invention_mentioned_twice_counts_twice_in_chair_i_and_once_in_chair_s():
    scores = scores_of(("a star, a star, a circle", {"circle"}))
    assert scores["chair_s"] == 1
    assert scores["chair_i"] == pytest.approx(2 / 3)
    assert scores["invented"] == 1


def test_an_empty_caption_invents_nothing_and_recalls_nothing():
    scores = scores_of((" . ", {"circle"}))
    assert scores == dict.fromkeys(scores, 0) | {"empty": 1}


def test_metrics_keep_the_leading_shape():
    sums = np.ones((7, 3, len(counts_matrix([])[0:1].T)))
    assert all(values.shape == (7, 3) for values in chair_metrics(sums).values())


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["circle", "star", "ring"])),
            st.sets(st.sampled_from(["circle", "ring"]), min_size=1),
        ),
        min_size=1,
    )
)
def test_bounds_hold_for_any_captions(captions: list[tuple[list[str], set[str]]]):
    scores = scores_of(*((" ".join(words), truth) for words, truth in captions))
    assert 0 <= scores["chair_i"] <= 1
    assert 0 <= scores["chair_s"] <= 1
    assert 0 <= scores["recall"] <= 1
    assert (scores["chair_s"] == 0) == (scores["chair_i"] == 0) == (scores["invented"] == 0)
