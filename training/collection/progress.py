"""How far a collection is, in lines. Knows numbers only."""

from __future__ import annotations

import time
from collections.abc import Callable

Report = Callable[[str], None]


class Progress:
    """Counts pairs as shards come in, and says so at most every few seconds. The rate begins with the first shard."""

    def __init__(self, report: Report, total: int, done: int, skipped: int, interval_s: float = 5.0) -> None:
        self._report, self._total, self._interval_s = report, total, interval_s
        self._done, self._skipped = done, skipped
        self._first: tuple[float, int] | None = None
        self._said = time.monotonic()

    def add(self, pairs: int, skipped: int) -> None:
        """One shard."""
        self._done += pairs + skipped
        self._skipped += skipped
        now = time.monotonic()
        if now - self._said >= self._interval_s or self._done == self._total:
            self._said = now
            self._report(self.line(now))
        self._first = self._first or (now, self._done)

    def line(self, now: float) -> str:
        """Pairs, rate, time left, skipped."""
        share = 100 * self._done / self._total
        said = f"{self._done:,} of {self._total:,} pairs ({share:.1f} %), {self._skipped:,} skipped"
        if self._first is None or now <= self._first[0]:
            return said
        rate = (self._done - self._first[1]) / (now - self._first[0])
        left = f", {_duration((self._total - self._done) / rate)} left" if self._done < self._total else ""
        return f"{said}, {rate:,.1f} pairs/s{left}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    begin = next((place for place, (number, _) in enumerate(parts) if number), 3)
    return " ".join(f"{number} {unit}" for number, unit in parts[begin : begin + 2])
