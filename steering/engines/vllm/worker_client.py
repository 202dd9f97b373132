"""Questions to vLLM's workers that always come to an end, also where vLLM does not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from steering.errors import EngineUnavailable

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

LOOK_EVERY_S = 0.5
"""vLLM leaves a question unanswered when its engine core dies: whether it has is looked at so often."""


class WorkerClient:
    """Calls methods of `vllm_plugin.worker.SteeringWorker` between two of vLLM's steps."""

    def __init__(self, vllm: AsyncLLM) -> None:
        self._vllm = vllm
        self._closed = False
        self._pending: set[asyncio.Task] = set()

    def close(self) -> None:
        """The engine is being stopped: no answer will come any more."""
        self._closed = True

    async def ask(self, method: str, *arguments: Any) -> Any:
        """The first worker's answer. Raises EngineUnavailable when the engine ends before it.

        Whoever stops waiting has asked nevertheless.
        """
        asking = self.tell(method, *arguments)
        while not asking.done():
            await asyncio.wait([asking], timeout=LOOK_EVERY_S)
            if not asking.done() and (self._closed or self._vllm.errored):
                asking.cancel()
                raise EngineUnavailable("the engine has ended; try again later")
        if asking.exception() is not None:
            raise EngineUnavailable("the engine has ended; try again later") from asking.exception()
        return asking.result()[0]

    def tell(self, method: str, *arguments: Any) -> asyncio.Task[list[Any]]:
        """Ask without waiting."""
        asking = asyncio.ensure_future(self._vllm.collective_rpc(method, args=arguments))
        self._pending.add(asking)
        asking.add_done_callback(self._forget)
        return asking

    def _forget(self, asked: asyncio.Task) -> None:
        self._pending.discard(asked)
        if not asked.cancelled():
            asked.exception()
