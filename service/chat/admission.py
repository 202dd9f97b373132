"""How much is worked on at a time, and who has to wait: places for requests, and bytes, in whatever form they are held.

Each limit of a single request is generous; without these, a few hundred requests at their limits would be too much. Of
several callers none may take more than half, so that nobody keeps all others out, and whoever has used up its own half
is told when *its* requests end: others hear nothing of it. Knows no HTTP and no images.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from service.chat.load_estimate import LoadEstimate
from service.errors import ApiError


class Overloaded(ApiError):
    """There is no room now."""

    def __init__(self, message: str, caller: str = "") -> None:
        """`caller`: whose own half is used up; empty where it is everybody's whole."""
        super().__init__("overloaded", f"{message}; try again later")
        self.caller = caller


class Admission:
    """The requests that one process works on."""

    def __init__(self, *, memory_bytes: int, in_progress: Gauge, clock: Callable[[], float] = time.monotonic) -> None:
        """`in_progress` shows how many requests there are; `clock` counts seconds."""
        self.memory = MemoryBudget(memory_bytes)
        self._gauge, self._clock = in_progress, clock
        self._taken: Counter[str] = Counter()
        """Places, by the caller's name."""
        self._load: dict[str, LoadEstimate] = {"": LoadEstimate(clock=clock)}
        """Of all callers together under the empty name, and of each that is told apart, while it has requests."""

    @property
    def running(self) -> int:
        """Requests now."""
        return self._taken.total()

    @contextmanager
    def place(self, caller: str, *, places: int) -> Iterator[None]:
        """Around all work on one of `places` requests. Raises Overloaded at once, or what the block raises."""
        if self._taken.total() >= places:
            raise self.told(Overloaded("too many requests at once"))
        if caller and self._taken[caller] >= (places + 1) // 2:
            raise self.told(Overloaded("the key has too many requests at once", caller))
        self._count(caller, 1)
        loads = [self._load.setdefault(name, LoadEstimate(clock=self._clock)) for name in dict.fromkeys(("", caller))]
        for load in loads:
            load.begin()
        try:
            yield
        except ApiError as error:
            self.told(error)
            raise
        finally:
            for load in loads:
                load.end()
            self._count(caller, -1)

    def told(self, error: ApiError) -> ApiError:
        """Where there was no room, with the time after which to come back."""
        if error.code == "overloaded":
            caller = error.caller if isinstance(error, Overloaded) else ""
            error.retry_after_s = self._load[caller].retry_after_s()
        return error

    def _count(self, caller: str, change: int) -> None:
        self._taken[caller] += change
        self._gauge.set(self._taken.total())
        if not self._taken[caller]:
            del self._taken[caller]
            if caller:
                del self._load[caller]


class MemoryBudget:
    """Bytes that may be taken, by all who share it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._by_caller: Counter[str] = Counter()
        self.taken_bytes = 0

    @contextmanager
    def share(self, caller: str) -> Iterator[Share]:
        """What one piece of work takes; given back at its end. `caller`: empty where nobody is told apart."""
        share = Share(self, caller)
        try:
            yield share
        finally:
            share.give_back()

    def take(self, caller: str, taken_bytes: int) -> None:
        """Raises Overloaded where there is not so much left."""
        if self.taken_bytes + taken_bytes > self._limit_bytes:
            raise Overloaded("the requests being worked on hold too many bytes")
        if caller and self._by_caller[caller] + taken_bytes > self._limit_bytes // 2:
            raise Overloaded("the key's requests being worked on hold too many bytes", caller)
        self.taken_bytes += taken_bytes
        self._by_caller[caller] += taken_bytes

    def give_back(self, caller: str, taken_bytes: int) -> None:
        """Callers that hold nothing are forgotten."""
        self.taken_bytes -= taken_bytes
        self._by_caller[caller] -= taken_bytes
        if not self._by_caller[caller]:
            del self._by_caller[caller]


class Share:
    """Grows as its work goes on."""

    def __init__(self, budget: MemoryBudget, caller: str) -> None:
        self._budget, self._caller, self._taken_bytes = budget, caller, 0

    def take(self, taken_bytes: int) -> None:
        """Raises Overloaded where the budget has not so much left."""
        self._budget.take(self._caller, taken_bytes)
        self._taken_bytes += taken_bytes

    def give_back(self) -> None:
        """All of it; what is given back twice counts once."""
        taken_bytes, self._taken_bytes = self._taken_bytes, 0
        if taken_bytes:
            self._budget.give_back(self._caller, taken_bytes)
