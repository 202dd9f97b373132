"""Places and bytes that requests hold together: taken, refused, given back however the work ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from service.chat.admission import Admission, MemoryBudget
from service.errors import ApiError
from service.metrics.meter import Metrics
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
