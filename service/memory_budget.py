"""How much the requests of one process may hold at a time: bodies and pixels. Knows no HTTP and no images.

Each limit of a single request is generous; without this one, a few hundred requests at their limits would be too much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import ApiError


class MemoryBudget:
    """Bytes that may be taken, by all who share it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.taken_bytes = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """What one piece of work takes; given back at its end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.taken_bytes -= share.taken_bytes

    def take(self, taken_bytes: int) -> None:
        """Raises ApiError where there is not so much left."""
        if self.taken_bytes + taken_bytes > self._limit_bytes:
            raise ApiError("overloaded", "the requests being worked on hold too many bytes; try again later")
        self.taken_bytes += taken_bytes


class Share:
    """Grows as its work goes on."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget, self.taken_bytes = budget, 0

    def take(self, taken_bytes: int) -> None:
        """Raises ApiError where the budget has not so much left."""
        self._budget.take(taken_bytes)
        self.taken_bytes += taken_bytes
