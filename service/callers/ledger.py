"""What all ingress replicas must agree on: how much each key has used, and which answers await feedback.

A plain class; where there are several replicas, one process holds it for all (`app.py`). Knows no keys' secrets, no
HTTP and no Ray. Everything here is lost with its process: quotas are then full again and feedback finds no request.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from steering.engines.base import Receipt

MINUTE_S = 60.0
ROUNDING_S = 1e-6
"""Times are sums of floats: who comes back when told must not be early by a rounding error."""
MAX_ANSWERS = 100_000
"""They take about 64 MB."""
ANSWER_LIFETIME_S = 3600.0
STRENGTH_BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""A strength is counted under the smallest of these that is not below it."""


class Charge(NamedTuple):
    """A wish to use something of which there is a limited amount a minute."""

    kind: str
    """What is used: 'requests', 'images' or 'pixels'."""
    amount: int
    per_minute: int
    """What may be used in a minute, and at once after a minute's rest; at least `amount`."""


class AnswerLabels(NamedTuple):
    """What feedback on an answer is counted by; every value is from a short list."""

    arm: str
    preset: str
    strength: str
    applied: str

    @classmethod
    def of(cls, receipt: Receipt, arm: str) -> AnswerLabels:
        """Those of an answer with this receipt, whose request is counted under this arm."""
        strength = receipt.strength or 0.0
        return cls(
            arm=arm,
            preset=receipt.preset or "none",
            strength=f"{next(bucket for bucket in STRENGTH_BUCKETS if strength <= bucket):g}",
            applied="true" if receipt.applied else "false",
        )


class _Answer(NamedTuple):
    ended: float
    caller: str
    labels: AnswerLabels


class Ledger:
    """Token buckets, and answers by their ids. Its methods never wait: each is one step for all who call."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, max_answers: int = MAX_ANSWERS) -> None:
        """`clock` counts seconds."""
        self._clock, self._max_answers = clock, max_answers
        self._full_at: dict[tuple[str, str], float] = {}
        """(caller, kind) to the time at which the bucket has filled up again."""
        self._answers: OrderedDict[str, _Answer] = OrderedDict()

    async def charge(self, caller: str, charges: tuple[Charge, ...]) -> float:
        """Use all of it and return 0, or nothing of it and return the seconds after which all would be granted."""
        now, full_at = self._clock(), {}
        for kind, amount, per_minute in charges:
            filled = max(self._full_at.get((caller, kind), now), now)
            full_at[caller, kind] = filled + amount * MINUTE_S / per_minute
        wait_s = max(full_at.values(), default=now) - (now + MINUTE_S)
        if wait_s > ROUNDING_S:
            return min(wait_s, MINUTE_S)
        self._full_at |= full_at
        return 0.0

    async def record_answer(self, answer_id: str, caller: str, labels: AnswerLabels) -> None:
        """Remember an answer for an hour, or until too many newer ones have come."""
        now = self._clock()
        self._answers[answer_id] = _Answer(now, caller, labels)
        while len(self._answers) > self._max_answers or self._oldest() < now - ANSWER_LIFETIME_S:
            self._answers.popitem(last=False)

    async def claim_answer(self, answer_id: str, caller: str) -> AnswerLabels | None:
        """Take out an answer that `caller` was given; None where there is none, or no longer."""
        answer = self._answers.get(answer_id)
        if answer is None or answer.caller != caller or answer.ended < self._clock() - ANSWER_LIFETIME_S:
            return None
        del self._answers[answer_id]
        return answer.labels

    def _oldest(self) -> float:
        return next(iter(self._answers.values())).ended
