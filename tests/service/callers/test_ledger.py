"""Quotas to the second, and which answers feedback may name."""

from __future__ import annotations

import asyncio
import math
import random
from contextlib import nullcontext
from typing import Any, cast

import pytest

from service.callers.ledger import (
    ANSWER_LIFETIME_S,
    LOST_TIMEOUT_S,
    TIMEOUT_S,
    AnswerLabels,
    Charge,
    Ledger,
    RayLedger,
)
from service.errors import ApiError

LABELS = AnswerLabels(arm="none", preset="captions", strength="1", applied="true")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    return Ledger(clock=clock, max_answers=3)


async def test_a_minute_s_worth_may_come_at_once_and_then_at_its_rate(ledger: Ledger, clock: Clock) -> None:
    one = (Charge("requests", 1, 6),)
    assert [await ledger.charge("alice", one) for _ in range(6)] == [0] * 6
    assert await ledger.charge("alice", one) == pytest.approx(10)
    assert await ledger.charge("alice", one) == pytest.approx(10), "a refusal uses nothing"
    assert await ledger.charge("bob", one) == 0
    clock.now += 4
    assert await ledger.charge("alice", one) == pytest.approx(6)
    clock.now += 6
    assert await ledger.charge("alice", one) == 0
    assert await ledger.charge("alice", one) == pytest.approx(10)
    clock.now += 3600
    assert [await ledger.charge("alice", one) for _ in range(7)] == [0] * 6 + [pytest.approx(10)], (
        "rest is not saved up"
    )


async def test_all_or_nothing(ledger: Ledger, clock: Clock) -> None:
    images, pixels = Charge("images", 2, 60), Charge("pixels", 900, 1000)
    assert await ledger.charge("alice", (images, pixels)) == 0
    assert await ledger.charge("alice", (images, pixels)) == pytest.approx(48), "the slower of the two decides"
    assert await ledger.charge("alice", (images._replace(amount=58),)) == 0, "the refused images were not used"
    assert await ledger.charge("alice", ()) == 0


async def test_coming_back_when_told_is_always_in_time(clock: Clock) -> None:
    """Whatever was used before; the header has whole seconds, rounded up."""
    chance = random.Random(0)
    ledger = Ledger(clock=clock)
    for _ in range(2000):
        per_minute = chance.choice((7, 100, 12_345_678))
        charges = (Charge(str(per_minute), chance.randint(1, per_minute), per_minute),)
        wait_s = await ledger.charge("alice", charges)
        assert wait_s <= 60
        if wait_s:
            clock.now += math.ceil(wait_s)
            assert await ledger.charge("alice", charges) == 0
        clock.now += chance.random()


async def test_never_more_than_the_quota_in_any_minute_after_the_first(ledger: Ledger, clock: Clock) -> None:
    granted = []
    for _ in range(3000):
        clock.now += 0.1
        if await ledger.charge("alice", (Charge("requests", 1, 30),)) == 0:
            granted.append(clock.now)
    assert len(granted) == 30 + 150 - 1, "a bucket full at the start, then one every two seconds for 300 s"
    assert max(sum(now <= one < now + 60 for one in granted) for now in range(1060, 1240)) <= 31


async def test_an_answer_is_claimed_once_by_its_caller(ledger: Ledger) -> None:
    await ledger.record_answer("a", "alice", LABELS)
    assert await ledger.claim_answer("a", "bob") is None
    assert await ledger.claim_answer("b", "alice") is None
    assert await ledger.claim_answer("a", "alice") == LABELS
    assert await ledger.claim_answer("a", "alice") is None


async def test_answers_are_forgotten_after_an_hour_and_when_there_are_too_many(ledger: Ledger, clock: Clock) -> None:
    for name in "abcd":
        await ledger.record_answer(name, "alice", LABELS)
    assert [await ledger.claim_answer(name, "alice") for name in "ab"] == [None, LABELS], "three are kept"
    clock.now += ANSWER_LIFETIME_S + 1
    assert await ledger.claim_answer("c", "alice") is None
    await ledger.record_answer("e", "alice", LABELS)
    assert list(ledger._answers) == ["e"], "what is too old is gone"


class Handle:
    """Like a Serve handle, whose process answers at once or is gone."""

    def __init__(self) -> None:
        self.gone = False
        self.charge = self

    async def remote(self, *_arguments: object) -> float:
        if self.gone:
            await asyncio.Event().wait()
        return 0.0


async def test_while_it_is_lost_only_the_first_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    wait_for = asyncio.wait_for

    async def in_no_time(answer: Any, timeout_s: float) -> Any:
        waits.append(timeout_s)
        return await wait_for(answer, 0.01)

    monkeypatch.setattr(asyncio, "wait_for", in_no_time)
    handle = Handle()
    ledger = RayLedger(cast(Any, handle))
    for gone in (False, True, True, True, False, False):
        handle.gone = gone
        with pytest.raises(ApiError, match="does not answer") if gone else nullcontext():
            await ledger.charge("alice", ())
    assert waits == [TIMEOUT_S, TIMEOUT_S, LOST_TIMEOUT_S, LOST_TIMEOUT_S, LOST_TIMEOUT_S, TIMEOUT_S]
