"""Callers take turns, and no place is lost, however waiting and working end."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

from service.fair_threads import FairThreads

PATIENCE_S = 20


class Work:
    """Jobs that end when they are told to, in the order in which they began."""

    def __init__(self, threads: int) -> None:
        self.threads = FairThreads(threads, "work")
        self.begun: list[str] = []
        self._ends: list[threading.Event] = []

    def start(self, *callers: str) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.threads.run(caller, self._job, caller)) for caller in callers]

    def _job(self, caller: str) -> None:
        end = threading.Event()
        self._ends.append(end)
        self.begun.append(caller)
        assert end.wait(PATIENCE_S)

    async def until_begun(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.begun) < count:
                await asyncio.sleep(0.001)

    def end_next(self) -> None:
        self._ends.pop(0).set()


async def test_nobody_waits_behind_all_of_another_s_jobs() -> None:
    work = Work(1)
    tasks = work.start(*"aaaa", "b", "c", "b")
    for count in range(1, 8):
        await work.until_begun(count)
        work.end_next()
    await asyncio.gather(*tasks)
    assert work.begun == ["a", "a", "b", "c", "a", "b", "a"]


async def test_who_does_not_wait_any_more_is_left_out() -> None:
    work = Work(1)
    tasks = work.start("a", "b", "c")
    await work.until_begun(1)
    tasks[1].cancel()
    for count in (1, 2):
        await work.until_begun(count)
        work.end_next()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert work.begun == ["a", "c"]
    assert tasks[1].cancelled()


async def test_a_place_given_to_somebody_who_leaves_in_that_moment_goes_on() -> None:
    threads = FairThreads(1, "work")
    await threads._take_place("a")
    leaving, staying = (asyncio.create_task(threads.run(caller, lambda: "done")) for caller in "bc")
    await asyncio.sleep(0)
    threads._pass_on()
    leaving.cancel()
    assert await asyncio.wait_for(staying, PATIENCE_S) == "done"
    assert leaving.cancelled()


async def test_a_job_that_nobody_waits_for_keeps_its_thread() -> None:
    """Else whoever leaves again and again would fill the pool's queue."""
    work = Work(1)
    (left,) = work.start("a")
    await work.until_begun(1)
    left.cancel()
    waiting = work.start("b", "b")
    await asyncio.sleep(0.05)
    assert work.begun == ["a"]
    assert work.threads._pool._work_queue.qsize() == 0
    for count in (1, 2, 3):
        await work.until_begun(count)
        work.end_next()
    await asyncio.gather(*waiting)


async def test_what_a_job_gives_is_passed_on() -> None:
    threads = FairThreads(1, "work")
    assert await threads.run("a", divmod, 7, 2) == (3, 1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await threads.run("a", divmod, 7, 0)
    threads.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            await threads.run("a", divmod, 7, 2)


async def test_no_place_is_lost_or_made() -> None:
    dice, threads, lock, now, most = random.Random(0), FairThreads(3, "work"), threading.Lock(), 0, 0

    def job() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.001)
        with lock:
            now -= 1

    for _ in range(20):
        tasks = [asyncio.create_task(threads.run(dice.choice("abc"), job)) for _ in range(30)]
        await asyncio.sleep(dice.random() / 100)
        for task in dice.sample(tasks, 15):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(PATIENCE_S):
            while threads._free < 3:
                await asyncio.sleep(0.001)
        assert threads._waiting == {}
    assert most == 3
