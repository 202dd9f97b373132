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
    """Calls methods of `plugin.worker.SteeringWorker` between two of vLLM's steps."""

    def __init__(self, vllm: AsyncLLM) -> None:
        self._vllm = vllm
        self._closed = False
        self._pending: set[asyncio.Task] = set()
        self._ended: dict[tuple[str, int | None], asyncio.Future[dict[str, Any] | None]] = {}
        """Sequences, with their ends, whose tallies will be asked for at the end of this turn of the event loop."""

    def close(self) -> None:
        """The engine is being stopped: no answer will come any more."""
        self._closed = True

    async def finish(self, sequence_id: str, end: int | None = None) -> dict[str, Any] | None:
        """What was done to a sequence, which is forgotten thereby; None for one that was not steered at all.

        `end`: the position that its last token was chosen at, for an explanation. Sequences that end in the same step
        are asked about together. Raises EngineUnavailable as `ask`.
        """
        return await self._add_ended(sequence_id, end)

    def forget(self, sequence_id: str) -> None:
        """As `finish`, where nobody wants to know."""
        self._add_ended(sequence_id, None).add_done_callback(_look_at_failure)

    async def ask(self, method: str, *arguments: Any) -> Any:
        """The first worker's answer. Raises EngineUnavailable when the engine ends before it.

        Whoever stops waiting has asked nevertheless.
        """
        asking = self._keep(asyncio.ensure_future(self._vllm.collective_rpc(method, args=arguments)))
        while not asking.done():
            await asyncio.wait([asking], timeout=LOOK_EVERY_S)
            if not asking.done() and (self._closed or self._vllm.errored):
                asking.cancel()
                raise EngineUnavailable("the engine has ended; try again later")
        if asking.exception() is not None:
            raise EngineUnavailable("the engine has ended; try again later") from asking.exception()
        return asking.result()[0]

    def _add_ended(self, sequence_id: str, end: int | None) -> asyncio.Future[dict[str, Any] | None]:
        loop = asyncio.get_running_loop()
        if not self._ended:
            loop.call_soon(lambda: self._keep(asyncio.ensure_future(self._ask_about_ended())))
        return self._ended.setdefault((sequence_id, end), loop.create_future())

    async def _ask_about_ended(self) -> None:
        ended, self._ended = self._ended, {}
        try:
            told = await self.ask("finish_steering", list(ended))
            for future, one in zip(ended.values(), told, strict=True):
                if not future.cancelled():
                    future.set_result(one)
        except BaseException as error:
            for future in ended.values():
                if not future.done():
                    future.set_exception(EngineUnavailable(f"the engine did not say what was done ({error!r})"))
            raise

    def _keep(self, task: asyncio.Task) -> asyncio.Task:
        """Until it is done; and its failure has been looked at."""
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        task.add_done_callback(_look_at_failure)
        return task


def _look_at_failure(done: asyncio.Future) -> None:
    """asyncio complains of one that nobody has looked at."""
    if not done.cancelled():
        done.exception()
