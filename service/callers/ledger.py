"""What all ingress replicas must agree on: how much each key has used, and which answers await feedback.

`Ledger` is a plain class; where there are several replicas, one process holds it for all (`app.py`), and they ask it by
a `RayLedger`. Knows no keys' secrets and no HTTP. Everything here is lost with its process: quotas are then full again
and feedback finds no request.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from service.callers.keys import Caller
from service.errors import ApiError
from steering.engines.base import Receipt

MINUTE_S = 60.0
ROUNDING_S = 1e-6
"""Times are sums of floats: who comes back when told must not be early by a rounding error."""
TIMEOUT_S = 2.0
"""For an answer of the process that holds it."""
LOST_TIMEOUT_S = 0.25
"""The same after it has not answered: while it is gone, requests do not wait for it one by one."""
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


class RayLedger:
    """A Ledger behind a Serve handle. Its methods raise ApiError where it does not answer."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._timeout_s = handle, TIMEOUT_S

    async def charge(self, caller: str, charges: tuple[Charge, ...]) -> float:
        return await self._call("charge", caller, charges)

    async def record_answer(self, answer_id: str, caller: str, labels: AnswerLabels) -> None:
        await self._call("record_answer", answer_id, caller, labels)

    async def claim_answer(self, answer_id: str, caller: str) -> AnswerLabels | None:
        return await self._call("claim_answer", answer_id, caller)

    async def _call(self, method: str, *arguments: object) -> Any:
        try:
            answer = await asyncio.wait_for(getattr(self._handle, method).remote(*arguments), self._timeout_s)
        except (TimeoutError, RayError, RayServeException):
            self._timeout_s = LOST_TIMEOUT_S
            raise ApiError("engine_unavailable", "the ledger of quotas does not answer; try again later") from None
        self._timeout_s = TIMEOUT_S
        return answer


async def charge(ledger: Ledger | RayLedger, caller: Caller, **amounts: int) -> None:
    """Raises ApiError where the caller's quota does not allow so many requests, images or pixels, together, now."""
    limits = {kind: getattr(caller.quota, f"{kind}_per_minute") for kind in amounts if amounts[kind]}
    charges = tuple(Charge(kind, amounts[kind], limit) for kind, limit in limits.items() if limit is not None)
    if not charges:
        return
    for one in charges:
        if one.amount > one.per_minute:
            raise ApiError(
                "request_too_large",
                f"messages: {one.amount} {one.kind} are more than the {one.per_minute} that the key may send in a "
                "minute; send less at once",
                param="messages",
            )
    wait_s = await ledger.charge(caller.name, charges)
    if wait_s > 0:
        quota = ", ".join(f"{one.per_minute} {one.kind}" for one in charges)
        raise ApiError(
            "rate_limit_exceeded",
            f"the key's quota is used up: {quota} a minute; see Retry-After",
            retry_after_s=wait_s,
        )
