"""Who falls into which arm: GrowthBook's published cases, shares, and that nobody moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.experiments.arms import Experiment
from service.experiments.assignment import Assignment, assign, bucket, chosen, ranges

CASES = json.loads((Path(__file__).parent / "growthbook_cases.json").read_text())
UNITS = [f"key:{number}" for number in range(10_000)]


def experiment(**changes) -> Experiment:
    arms = [{"name": "control", "weight": 0.5}, {"name": "half", "weight": 0.5, "steering": {"strength": 0.5}}]
    return Experiment.model_validate({"name": "strength", "arms": arms, **changes})


def label(found: Experiment, unit: str) -> str:
    return assign(found, unit=unit, own_steering=False).label


@pytest.mark.parametrize(("seed", "value", "expected"), CASES["hash"])
def test_the_hash_is_growthbook_s(seed: str, value: str, expected: float) -> None:
    assert bucket(seed, value) == expected


@pytest.mark.parametrize(("name", "weights", "coverage", "expected"), CASES["getBucketRange"])
def test_the_ranges_are_growthbook_s(name: str, weights: list, coverage: float, expected: list) -> None:
    assert ranges(weights, coverage) == [pytest.approx(tuple(one)) for one in expected], name


@pytest.mark.parametrize(("name", "place", "open_to", "expected"), CASES["chooseVariation"])
def test_the_choice_is_growthbook_s(name: str, place: float, open_to: list, expected: int) -> None:
    found = chosen(place, [tuple(one) for one in open_to])
    assert (-1 if found is None else found) == expected, name


@given(st.text(), st.text())
def test_every_text_has_a_place(seed: str, value: str) -> None:
    assert 0 <= bucket(seed, value) < 1


def test_every_place_belongs_to_one_arm_whatever_the_weights() -> None:
    for weights in ([0.1] * 10, [0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]):
        open_to = ranges(weights, 1.0)
        assert all(chosen(place / 10_000, open_to) is not None for place in range(10_000))


def test_shares_are_the_weights() -> None:
    uneven = experiment(arms=[{"name": "control", "weight": 0.8}, {"name": "half", "weight": 0.2}])
    labels = [label(uneven, unit) for unit in UNITS]
    assert labels.count("half") == pytest.approx(2000, abs=160), "four standard deviations"


def test_a_growing_coverage_moves_nobody() -> None:
    before = dict.fromkeys(UNITS, "not_covered")
    for coverage in (0.1, 0.35, 0.9, 1.0):
        now = {unit: label(experiment(coverage=coverage), unit) for unit in UNITS}
        moved = [unit for unit in UNITS if before[unit] not in ("not_covered", now[unit])]
        assert moved == []
        covered = sum(one != "not_covered" for one in now.values())
        assert covered / len(UNITS) == pytest.approx(coverage, abs=0.02)
        before = now


def test_another_salt_deals_anew() -> None:
    same = sum(label(experiment(salt="a"), unit) == label(experiment(salt="b"), unit) for unit in UNITS)
    assert same / len(UNITS) == pytest.approx(0.5, abs=0.02)
    assert [label(experiment(), unit) for unit in UNITS[:50]] == [
        label(experiment(salt="strength"), unit) for unit in UNITS[:50]
    ]


def test_without_a_unit_it_is_the_default_arm_and_counted_apart() -> None:
    found = assign(experiment(), unit=None, own_steering=False)
    assert (found.shown, found.label, found.reason, found.unit) == ("control", "no_unit", "no_unit", None)


def test_a_caller_s_own_steering_is_in_no_arm() -> None:
    found = assign(experiment(), unit="alice:1", own_steering=True)
    assert (found.shown, found.label, found.arm) == ("own", "own", None)


def test_who_is_not_covered_is_in_no_arm() -> None:
    found = assign(experiment(coverage=0), unit="alice:1", own_steering=False)
    assert (found.shown, found.label, found.arm) == ("not_covered", "not_covered", None)


def test_the_digest_tells_units_apart_and_not_who_they_are() -> None:
    def found(unit: str, **changes) -> Assignment:
        return assign(experiment(**changes), unit=unit, own_steering=False)

    digests = {found(unit).unit for unit in UNITS}
    assert len(digests) == len(UNITS)
    assert found("alice:1").unit == found("alice:1", coverage=0.5).unit
    assert found("alice:1").unit != found("alice:1", salt="other").unit
    assert "alice" not in (found("alice:1").unit or "")
