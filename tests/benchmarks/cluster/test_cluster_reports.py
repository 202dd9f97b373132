"""What the cluster's benchmarks make of a run: a stream that was cut, or a replica that never came, fails it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.cluster import autoscaling, mistakes, recovery


def sample(at: float, **states: int) -> dict[str, Any]:
    return {"at": at, "status": "RUNNING", "message": "", "deployments": {"Model": {"states": states}}}


def test_a_timeline_has_every_change_once() -> None:
    samples = [
        sample(1.0, RUNNING=1),
        sample(1.5, RUNNING=1),
        sample(2.0, RUNNING=1, STARTING=1),
        sample(9.0, RUNNING=2),
    ]
    assert autoscaling.timeline(samples, 1.0) == [
        {"at_s": 0.0, "states": {"RUNNING": 1}},
        {"at_s": 1.0, "states": {"RUNNING": 1, "STARTING": 1}},
        {"at_s": 8.0, "states": {"RUNNING": 2}},
    ]


def test_the_longest_that_a_replica_stayed_for_its_requests() -> None:
    stopping = [sample(at, RUNNING=1, STOPPING=1) for at in (2.0, 3.0, 5.5)]
    again = [sample(at, RUNNING=1, STOPPING=1) for at in (8.0, 9.0)]
    assert autoscaling.longest_stopping([sample(1.0, RUNNING=2), *stopping, sample(6.0, RUNNING=1), *again]) == 3.5
    assert autoscaling.longest_stopping([sample(1.0, RUNNING=2)]) == 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, []),
        ({"endings": {"right": 3, "tie": 1, "duplicated": 0, "wrong": 1}}, ["1 wrong"]),
        ({"endings": {"right": 3, "duplicated": 1}}, ["1 duplicated"]),
        ({"long_streams": {"complete": 2, "cut": 1}}, ["1 cut"]),
        ({"took": {"up_s": 3.0, "down_s": None}}, ["never down_s"]),
    ],
)
def test_what_fails_an_autoscaling_run(change: dict[str, Any], says: list[str]) -> None:
    good = {"endings": {"right": 4, "duplicated": 0}, "long_streams": {"complete": 2}, "took": {"up_s": 3.0}}
    assert autoscaling.failures(good | change) == says


@pytest.mark.parametrize(
    ("event", "change", "says"),
    [
        ("update", {}, []),
        ("update", {"endings": {"right": 3, "cut (200)": 1}}, ["update: {'cut (200)': 1}"]),
        ("update", {"versions": {"fp_a": 9}}, ["update: answers came from {'fp_a': 9}"]),
        ("worker", {"endings": {"right": 3, "cut (200)": 1}}, []),
        ("head", {"endings": {"right": 3, "wrong": 1}}, ["head: 1 wrong"]),
        ("worker", {"not_back": "after 300 s: []"}, ["worker: not as before after 300 s: []"]),
        ("head", {"next_answer_after_s": None}, ["head: no answer afterwards"]),
    ],
)
def test_what_fails_a_recovery(event: str, change: dict[str, Any], says: list[str]) -> None:
    row = {"event": event, "endings": {"right": 4}, "versions": {"fp_a": 2, "fp_b": 2}, "next_answer_after_s": 1.0}
    assert recovery.failures([row | change]) == says


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, []),
        ({"endings": {"right": 3, "overloaded (503)": 1}}, ["gpu: {'overloaded (503)': 1}"]),
        ({"named": False, "words": "x"}, ["gpu: not named in x"]),
    ],
)
def test_what_fails_a_mistake(change: dict[str, Any], says: list[str]) -> None:
    row = {"event": "gpu", "endings": {"right": 4}, "named": True}
    assert mistakes.failures([row | change]) == says


def test_what_serve_tells_of_a_mistake() -> None:
    deployed = {"status": "RUNNING", "message": "", "deployments": {"Model": {"status": "HEALTHY", "message": ""}}}
    assert mistakes.told(deployed) == ""
    waiting = {"Model": {"status": "UPDATING", "message": "Resources required for each replica: {}"}}
    assert "Resources" in mistakes.told(deployed | {"deployments": waiting})
    assert "no such file" in mistakes.told(deployed | {"status": "DEPLOY_FAILED", "message": "no such file"})
