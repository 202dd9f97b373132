"""The ingress's view of the ledger: in its own process, or, where there are several replicas, in one for all."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from service.callers.ledger import AnswerLabels, Charge
from service.errors import ApiError

TIMEOUT_S = 2.0


class LedgerClient(Protocol):
    """What the HTTP side needs of a ledger; `Ledger` itself is one. Raises ApiError where it cannot be reached."""

    async def charge(self, caller: str, charges: tuple[Charge, ...]) -> float: ...

    async def record_answer(self, answer_id: str, caller: str, labels: AnswerLabels) -> None: ...

    async def claim_answer(self, answer_id: str, caller: str) -> AnswerLabels | None: ...


class RayLedger:
    """`LedgerClient` over a Serve handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def charge(self, caller: str, charges: tuple[Charge, ...]) -> float:
        return await self._call("charge", caller, charges)

    async def record_answer(self, answer_id: str, caller: str, labels: AnswerLabels) -> None:
        await self._call("record_answer", answer_id, caller, labels)

    async def claim_answer(self, answer_id: str, caller: str) -> AnswerLabels | None:
        return await self._call("claim_answer", answer_id, caller)

    async def _call(self, method: str, *arguments: object) -> Any:
        try:
            return await asyncio.wait_for(getattr(self._handle, method).remote(*arguments), TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException):
            raise ApiError("engine_unavailable", "the ledger of quotas does not answer; try again later") from None
