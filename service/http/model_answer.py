"""A request that asks the model and gets its answer whole: admitted, bounded in time and memory, and given back however
it ends. What it asks is its work's matter (`compare_route.py`, `concepts_route.py`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.chat.request import Shares
from service.errors import ApiError
from service.http.body import Fields, read_fields
from service.http.chat_route import ChatRoute, within
from service.metrics.request_record import record_of

log = logging.getLogger(__name__)


class Admitted:
    """One request that has its place."""

    def __init__(self, route: ChatRoute, request: Request, places: ExitStack) -> None:
        self.route, self.request = route, request
        self.settings = route.live.current
        self.caller = request.state.caller
        self.record = record_of(request.scope)
        self._places = places
        self._held = places.enter_context(route.admission.memory.share(self.caller.name))

    def take_places(self, count: int) -> None:
        """So many more: whoever asks for several answers leaves less room. Raises ApiError where there is none."""
        for _ in range(count):
            places = self.settings.max_concurrent_requests
            self._places.enter_context(self.route.admission.place(self.caller.name, places=places))

    @asynccontextmanager
    async def body(self, fields: type[Fields]) -> AsyncIterator[tuple[Fields, Shares]]:
        """The body's fields, and what counts all that is made of them: of what it took, until the block ends. Raises
        ApiError."""
        with self.route.admission.memory.share(self.caller.name) as share:
            yield await read_fields(self.request, self.settings, share, fields), Shares(body=share, held=self._held)


Work = Callable[[Admitted], Awaitable[Response]]


class ModelAnswer(Response):
    """Does all its work while it is being sent, in one coroutine, as `chat_route.ChatAnswer` does."""

    def __init__(self, route: ChatRoute, request: Request, work: Work) -> None:
        super().__init__()
        self._route, self._request, self._work = route, request, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._route.drain.at_work():  # until the last byte, of an error too
            try:
                answer = await self._admitted()
            except ApiError as error:
                answer = self._refusal(error)
            except ClientDisconnect:
                return  # in the middle of its body
            except Exception:
                log.exception("a request failed in a way nobody foresaw")
                answer = self._refusal(ApiError("internal_error", "the server failed on this request"))
            await answer(scope, receive, send)

    async def _admitted(self) -> Response:
        settings, caller = self._route.live.current, self._request.state.caller
        with ExitStack() as places:
            async with self._route.drain.request():
                places.enter_context(self._route.admission.place(caller.name, places=settings.max_concurrent_requests))
                self._route.shadows.make_way(settings)
                async with within(settings.request_timeout_s):
                    return await self._work(Admitted(self._route, self._request, places))

    def _refusal(self, error: ApiError) -> Response:
        record_of(self._request.scope).error_code = error.code
        return error.response()
