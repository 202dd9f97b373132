"""How much the requests of one process may hold at a time, in whatever form. Knows no HTTP and no images.

Each limit of a single request is generous; without this one, a few hundred requests at their limits would be too much.
Of several callers none may take more than half, so that nobody keeps all others out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import ApiError


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
        """Raises ApiError where there is not so much left."""
        if self.taken_bytes + taken_bytes > self._limit_bytes:
            raise ApiError("overloaded", "the requests being worked on hold too many bytes; try again later")
        if caller and self._by_caller[caller] + taken_bytes > self._limit_bytes // 2:
            raise ApiError("overloaded", "the key's requests being worked on hold too many bytes; try again later")
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
        """Raises ApiError where the budget has not so much left."""
        self._budget.take(self._caller, taken_bytes)
        self._taken_bytes += taken_bytes

    def give_back(self) -> None:
        """All of it; what is given back twice counts once."""
        taken_bytes, self._taken_bytes = self._taken_bytes, 0
        if taken_bytes:
            self._budget.give_back(self._caller, taken_bytes)
