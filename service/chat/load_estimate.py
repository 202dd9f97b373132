"""When to come back: from how fast places have become free lately and how many were told to come before.

Knows no HTTP. Each refused client is given the next place that should become free, so that they do not all return at
the same moment.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 30.0
"""How far back 'lately' goes."""
SHORTEST_S, LONGEST_S = 1.0, 60.0
"""Nobody is told to stay away for longer: who never returns is counted too, and OpenAI's clients heed no more."""


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
