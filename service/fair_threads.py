"""Threads in which callers take turns, whatever each of them has waiting.

One caller's thousand jobs then cost another caller one job's wait. What waits holds nothing in a thread pool's queue:
who gives up takes everything along. Knows no work, and of callers their names.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class FairThreads:
    """So many jobs run at a time."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._free = threads
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By caller; the caller whose turn is next comes first."""

    async def run(
        self, caller: str, job: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """What `job` returns or raises, in a thread, when it is the caller's turn.

        A job that runs cannot be interrupted: its thread counts as taken until it has ended, though nobody waits.
        """
        await self._take_place(caller)
        loop = asyncio.get_running_loop()
        try:
            running = self._pool.submit(job, *args, **kwargs)
        except BaseException:
            self._pass_on()
            raise
        running.add_done_callback(lambda _: self._ended(loop))
        return await asyncio.shield(asyncio.wrap_future(running))

    def close(self) -> None:
        """Nothing new begins; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ended(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called by the job's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(self._pass_on)

    async def _take_place(self, caller: str) -> None:
        if self._free:  # then nobody waits
            self._free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():  # it was given in the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """The place that has become free, to the next who still wants it."""
        while self._waiting:
            caller = next(iter(self._waiting))
            places = self._waiting.pop(caller)
            place = places.popleft()
            if places:
                self._waiting[caller] = places
            if not place.done():
                place.set_result(None)
                return
        self._free += 1
