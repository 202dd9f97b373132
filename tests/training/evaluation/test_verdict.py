"""Sentences say what the numbers show, and what they do not show."""

from __future__ import annotations

import pytest

from tests.training.made_up import answered, board, captioned
from training.evaluation.measuring import answers_key
from training.evaluation.verdict import NOT_ALIGNMENT, verdict

SECOND = answers_key("adversarial", "second")


def told(start: str, **counts: dict) -> str:
    """The sentences that begin so."""
    return "\n".join(line for line in verdict(board(**counts)) if line.startswith(start))


def test_a_gain_that_other_images_have_too_is_not_called_alignment():
    counts = {"plain": answered(0.5), "steered": answered(0.8), "other_image": answered(0.8)}
    assert "adversarial questions: accuracy better" in told("steered", **counts)
    assert "is NOT beyond other_image" in told("steered", **counts)
    assert NOT_ALIGNMENT in told("steered", **counts)
    assert "is beyond other_image" in told("steered", **counts | {"other_image": answered(0.5)})


def test_a_gain_in_second_turns_is_held_against_other_images_in_second_turns():
    def both(first: float, second: float) -> dict:
        return answered(first) | answered(second, SECOND)

    found = told("steered, adversarial", plain=both(0.5, 0.5), steered=both(0.5, 0.8), other_image=both(0.8, 0.5))
    assert "adversarial questions: accuracy not worse by more than 1 point (+0.000" in found
    assert "adversarial, second turn questions: accuracy better" in found
    assert "adversarial, second turn questions: the gain is beyond other_image" in found


@pytest.mark.parametrize(
    ("default", "claim"),
    [
        (0.8, "default: no question is answered worse: every score is plain's own"),
        (0.82, "default: harms no question: accuracy adversarial +0.020"),
        (0.795, "default: is NOT SHOWN to harm no question: accuracy adversarial -0.005"),
        (0.77, "default: HARMS questions: accuracy adversarial -0.030"),
    ],
)
def test_what_everybody_gets_is_harmless_only_where_that_is_shown(default: float, claim: str):
    found = told("default", plain=answered(0.8), default=answered(default))
    assert found.startswith(claim)
    assert ("not worse by more than 1 point" in found) == (default == 0.82)
    assert ("NOT SHOWN: the interval reaches -0.0" in found) == (default == 0.795)
    assert ("ask more questions" in found) == (default == 0.795)


def test_harm_in_second_turns_alone_is_harm():
    plain, default = answered(0.8) | answered(0.8, SECOND), answered(0.8) | answered(0.6, SECOND)
    found = told("default", plain=plain, default=default)
    assert found.startswith("default: HARMS questions")
    assert "adversarial +0.000 [+0.000, +0.000] not worse by more than 1 point" in found
    assert "adversarial, second turn -0.200" in found


def test_a_split_without_adversarial_has_no_sentence_about_it():
    counts = {name: answered(share, "random") for name, share in (("plain", 0.8), ("steered", 0.5), ("default", 0.5))}
    assert told("default", **counts).startswith("default: HARMS questions")
    assert told("steered", **counts).startswith("steered, random questions: accuracy WORSE")
    assert "adversarial" not in told("", **counts)


def test_captions_alone():
    counts = {"plain": captioned(0.6), "steered": captioned(0.2), "other_image": captioned(0.6)}
    assert "lowers CHAIR_s from 0.600 to 0.200" in told("steered", **counts)
    assert "allowed is a drop of 0.02: not worse by more than 2 points" in told("steered: recall", **counts)
    assert told("other_image: does not lower CHAIR_s", **counts)


def test_lost_objects_are_told():
    assert "WORSE" in told("steered: recall", plain=captioned(0.6), steered=captioned(0.0, both_named=0.0))


def test_a_default_that_is_not_for_captions_is_judged_by_what_it_does_to_them():
    found = told("default", plain=captioned(0.5), default=captioned(0.505))
    assert "CHAIR_s 0.505 is NOT below plain's 0.500" in found
    assert "CHAIR_s not worse by more than 2 points; recall not worse by more than 1 point" in found
    assert "CHAIR_s WORSE" in told("default", plain=captioned(0.5), default=captioned(0.6))


def test_nothing_is_said_without_plain():
    assert verdict(board(steered=captioned(0.1))) == ["Nothing can be said without the condition plain."]
