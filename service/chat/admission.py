"""How much is worked on at a time, and who has to wait: places for requests, and bytes, in whatever form they are held.

Each limit of a single request is generous; without these, a few hundred requests at their limits would be too much. Of
several callers none may take more than half, so that nobody keeps all others out, and whoever has used up its own half
is told when *its* requests end: others hear nothing of it. Each refused client is given the next place that should
become free, so that they do not all return at the same moment. Knows no HTTP and no images.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from service.errors import ApiError

WINDOW_S = 30.0
"""How far back 'lately' goes, where it is estimated how fast places become free."""
SHORTEST_S, LONGEST_S = 1.0, 60.0
"""Nobody is told to stay away for longer: who never returns is counted too, and OpenAI's clients heed no more."""


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


class LoadEstimate:
    """Fed by requests that begin and end; answers how long a refused one should wait."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` counts seconds."""
        self._clock = clock
        self._running = 0
        self._busy_since = 0.0
        self._ended: deque[float] = deque()
        self._promised = 0.0
        """When the last place that somebody was told of becomes free."""

    def begin(self) -> None:
        """A request was admitted."""
        if self._running == 0:
            self._busy_since = self._clock()  # rest says nothing about capacity
        self._running += 1

    def end(self) -> None:
        """An admitted request is over, however it ended."""
        now = self._clock()
        self._running -= 1
        self._ended.append(now)
        self._forget_before(now - WINDOW_S)

    def retry_after_s(self) -> float:
        """Seconds until the next place that nobody else was told of; from 1 to 60."""
        now = self._clock()
        self._promised = min(max(self._promised, now) + self._seconds_per_place(now), now + LONGEST_S)
        return min(max(self._promised - now, SHORTEST_S), LONGEST_S)

    def _seconds_per_place(self, now: float) -> float:
        """Measured while there was work without a break; as long as nothing has ended, it takes at least so long."""
        since = max(self._busy_since, now - WINDOW_S)
        self._forget_before(since)
        return (now - since) / max(len(self._ended), 1)

    def _forget_before(self, since: float) -> None:
        while self._ended and self._ended[0] <= since:
            self._ended.popleft()
