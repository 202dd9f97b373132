"""Whether the model makes progress, from its status a moment ago: who asks how it is must not be work for it. Knows no
HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from service.artifacts import MAIN
from service.errors import ApiError
from service.model.client import ModelClient
from service.model.presence import Presence
from service.model.replica import ModelStatus

FRESH_S = 0.25
"""A look so long ago is as good as a new one."""
PATIENCE_S = 3.0
"""While a new look takes its time, the last one answers for so long: longer than a look may take."""

BUSY_WINDOW_S = 5.0
"""A token that is not older says that the model lives, though all its places are taken."""

UNREADY_AFTER_S = 10.0
"""An engine with work that makes no step for so long is not ready; it is again with the next step."""

Found = TypeVar("Found")


class Readiness:
    """Ready is a model that makes progress, or has none to make.

    One that `may_sleep` is asked while a generation of ours is with it, and not otherwise: asking is load, which would
    keep its last replica from going, or start one. Without a replica it is ready where a request brings one.
    """

    def __init__(
        self, model: ModelClient, artifact: Callable[[], str] = lambda: MAIN, *, may_sleep: bool = False
    ) -> None:
        """`artifact`: the name of the one that answers by default."""
        self._model, self._artifact, self._may_sleep = model, artifact, may_sleep
        self._status, self._presence = Recent(lambda: model.status(artifact())), Recent(model.presence)
        self._last: ModelStatus | None = None

    async def check(self) -> dict:
        """What `/readyz` says; raises ApiError where it is not ready. A model too busy to be asked is ready as long as
        its tokens arrive.
        """
        if self._sleepy:
            presence = await self._presence.look()
            if presence is Presence.ABSENT:
                raise ApiError("engine_unavailable", "the model does not run yet; try again later")
            if presence is Presence.ASLEEP or not self._model.is_working:
                return {"status": "ready"}
        try:
            health = (await self._ask()).health
        except ApiError:
            if self._model.seconds_since_event(self._artifact()) <= BUSY_WINDOW_S:
                return {"status": "ready"}
            raise
        if not health.alive or health.seconds_since_progress > UNREADY_AFTER_S:
            raise ApiError("engine_unavailable", "the model makes no progress; try again later")
        return {"status": "ready", "running": health.running, "waiting": health.waiting}

    async def status(self) -> ModelStatus:
        """Of a model that may sleep as it once was, since its capabilities do not change. Raises ApiError where it does
        not answer, or sleeps and was never asked.
        """
        if not self._sleepy or self._model.is_working:
            return await self._ask()
        if self._last is None:
            if await self._presence.look() is not Presence.AWAKE:
                raise ApiError("engine_unavailable", "the model has no replica now, and says this when it has one")
            return await self._ask()
        return self._last

    @property
    def _sleepy(self) -> bool:
        """A candidate that has become the default is always asked."""
        return self._may_sleep and self._artifact() == MAIN

    async def _ask(self) -> ModelStatus:
        self._last = await self._status.look()
        return self._last


class Recent(Generic[Found]):
    """One look at a time, whoever asks and however many."""

    def __init__(self, ask: Callable[[], Awaitable[Found]]) -> None:
        self._ask = ask
        self._at = float("-inf")
        self._found: Found | Exception | None = None
        self._looking: asyncio.Task[None] | None = None

    async def look(self) -> Found:
        """Raises what the look raised: ApiError where the model does not answer."""
        age_s = time.monotonic() - self._at
        if self._looking is not None:
            if age_s > PATIENCE_S:
                await asyncio.shield(self._looking)
        elif age_s > FRESH_S:
            self._looking = asyncio.create_task(self._look())
            await asyncio.shield(self._looking)
        assert self._found is not None
        if isinstance(self._found, Exception):
            raise self._found.with_traceback(None)
        return self._found

    async def _look(self) -> None:
        """Goes on though who asked first has left: others wait for it."""
        try:
            self._found = await self._ask()
        except Exception as error:
            self._found = error
        finally:
            self._at, self._looking = time.monotonic(), None
