"""The model's status as it was a moment ago: who asks how it is must not be work for it. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from service.model_replica import ModelStatus

FRESH_S = 0.25
"""A look so long ago is as good as a new one."""
PATIENCE_S = 3.0
"""While a new look takes its time, the last one answers for so long: longer than a look may take."""


class LastLook:
    """One status call at a time, whoever asks and however many."""

    def __init__(self, ask: Callable[[], Awaitable[ModelStatus]]) -> None:
        self._ask = ask
        self._at = float("-inf")
        self._found: ModelStatus | Exception | None = None
        self._looking: asyncio.Task[None] | None = None

    async def status(self) -> ModelStatus:
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
