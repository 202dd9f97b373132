"""When a refused client is told to come back."""

from __future__ import annotations

import math

import pytest

from service.chat.load_estimate import WINDOW_S, LoadEstimate
from tests.service.callers.test_ledger import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def load(clock: Clock) -> LoadEstimate:
    return LoadEstimate(clock=clock)


def work(load: LoadEstimate, clock: Clock, *, seconds_per_request: float, seconds: float) -> None:
    """Always busy: as one request ends, the next begins."""
    for _ in range(round(seconds / seconds_per_request)):
        clock.now += seconds_per_request
        load.begin()
        load.end()


def test_the_next_place_and_for_others_the_places_after_it(load: LoadEstimate, clock: Clock) -> None:
    load.begin()
    work(load, clock, seconds_per_request=2, seconds=20)
    assert [load.retry_after_s() for _ in range(3)] == pytest.approx([2, 4, 6])
    clock.now += 5
    assert load.retry_after_s() < 4, "two of the three are back by now"


def test_a_service_that_has_sped_up_says_so(load: LoadEstimate, clock: Clock) -> None:
    load.begin()
    work(load, clock, seconds_per_request=10, seconds=100)
    slow = load.retry_after_s()
    work(load, clock, seconds_per_request=2, seconds=WINDOW_S)
    assert slow == pytest.approx(10, rel=0.1)
    assert load.retry_after_s() == pytest.approx(2, rel=0.1)


def test_rest_says_nothing_about_capacity(load: LoadEstimate, clock: Clock) -> None:
    load.begin()
    load.end()
    clock.now += 25
    load.begin()
    clock.now += 0.5
    assert load.retry_after_s() == 1


def test_while_nothing_ends_the_wait_grows(load: LoadEstimate, clock: Clock) -> None:
    load.begin()
    clock.now += 8
    assert load.retry_after_s() == pytest.approx(8)


def test_nobody_is_sent_away_for_more_than_a_minute_or_less_than_a_second(load: LoadEstimate, clock: Clock) -> None:
    load.begin()
    assert load.retry_after_s() == 1
    clock.now += 20
    clock.now += math.pi  # times at which sums are rounded
    assert 59.9 < max(load.retry_after_s() for _ in range(100)) <= 60
    work(load, clock, seconds_per_request=0.01, seconds=90)
    assert load.retry_after_s() == 1


def test_memory_does_not_grow_while_nobody_is_refused(load: LoadEstimate, clock: Clock) -> None:
    load.begin()
    work(load, clock, seconds_per_request=0.1, seconds=4 * WINDOW_S)
    assert len(load._ended) <= WINDOW_S / 0.1 + 1
