"""Places and bytes that requests hold: taken, refused, given back however the work ends; and when to come back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from service.chat.admission import WINDOW_S, Admission, LoadEstimate, MemoryBudget
from service.errors import ApiError
from service.metrics.exposition import Metrics
from tests.service.callers.test_ledger import Clock


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def admission(metrics: Metrics, memory_bytes: int = 100, **options: Any) -> Admission:
    return Admission(memory_bytes=memory_bytes, in_progress=metrics.in_progress, **options)


def in_progress(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("vlsae_requests_in_progress")


@pytest.mark.parametrize("caller", ["", "alice"])
def test_a_place_is_given_back_after_any_exception(metrics: Metrics, caller: str) -> None:
    requests, seen = admission(metrics), []

    def fail() -> None:
        with requests.place(caller, places=1):
            seen.append(in_progress(metrics))
            raise KeyError

    for _ in range(3):
        with pytest.raises(KeyError):
            fail()
        seen.append(in_progress(metrics))
    assert seen == [1, 0] * 3


def refused(work: AbstractContextManager[object]) -> ApiError:
    with pytest.raises(ApiError) as caught, work:
        pass
    assert caught.value.code == "overloaded"
    return caught.value


def test_who_is_refused_for_its_own_half_sends_nobody_else_away(metrics: Metrics) -> None:
    """A key that is refused over and over waits for its own places; what others are told does not grow with that."""
    clock = Clock()
    requests = admission(metrics, clock=clock)
    with requests.place("greedy", places=4), requests.place("greedy", places=4):
        clock.now += 1  # a place seems to take a second
        own = [refused(requests.place("greedy", places=4)) for _ in range(200)]
        assert "the key has too many requests" in own[-1].message
        assert own[-1].retry_after_s == 60
        with requests.place("a", places=4), requests.place("b", places=4):
            full = refused(requests.place("c", places=4))
    assert full.message.startswith("too many requests")
    assert full.retry_after_s <= 2


def test_who_holds_its_half_of_the_bytes_sends_nobody_else_away(metrics: Metrics) -> None:
    clock = Clock()
    requests = admission(metrics, memory_bytes=10, clock=clock)
    with requests.place("a", places=4):
        clock.now += 1
        for _ in range(100):
            error = refused(_taking(requests, "greedy", 6))
            assert "the key's requests" in error.message
        error = refused(_taking(requests, "b", 11))
    assert (error.message.startswith("the requests"), error.retry_after_s <= 2) == (True, True)


@contextmanager
def _taking(requests: Admission, caller: str, count: int) -> Iterator[None]:
    with requests.place(caller, places=4), requests.memory.share(caller) as held:
        held.take(count)
        yield


def test_shares_add_up_and_are_given_back() -> None:
    budget = MemoryBudget(10)
    with budget.share("") as first:
        first.take(4)
        with budget.share("") as second:
            second.take(6)
            with pytest.raises(ApiError, match="too many bytes"):
                second.take(1)
        assert budget.taken_bytes == 4, "all of the second share"
        first.take(6)
        first.give_back()
        assert budget.taken_bytes == 0, "at once, not only at the end"
    assert budget.taken_bytes == 0, "and once"


def test_one_caller_of_several_gets_half() -> None:
    budget = MemoryBudget(10)
    with budget.share("a") as one, budget.share("a") as another, budget.share("b") as of_b:
        one.take(3)
        another.take(2)
        with pytest.raises(ApiError, match="the key's"):
            another.take(1)
        of_b.take(5)
        one.give_back()
        another.take(3)


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
