"""A request that asks the model: admitted, bounded in time and memory, answered, and given back however it ends. What
it asks is its work's matter (`chat_route.py`, `compare_route.py`, `concepts/route.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from fastapi import Request, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.chat.admission import Admission
from service.chat.request import ChatRunner, RequestContext
from service.chat.shadow import Shadows
from service.chat.steering_sources import STRENGTH_HEADER
from service.chat.streaming import error_event
from service.draining import Drain
from service.errors import ApiError
from service.http.body import Fields, read_fields
from service.live_settings import LiveSettings
from service.metrics.exposition import Metrics
from service.metrics.meter import Meter
from service.metrics.request_record import record_of

log = logging.getLogger(__name__)
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelRequests:
    """What all of them share."""

    live: LiveSettings
    runner: ChatRunner
    admission: Admission
    drain: Drain
    metrics: Metrics
    shadows: Shadows


class Reply:
    """What goes out to one client."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._streams = False

    async def whole(self, answer: bytes) -> None:
        """JSON."""
        await Response(answer, media_type="application/json")(self._scope, self._receive, self._send)

    async def stream(self, chunks: AsyncIterator[bytes]) -> None:
        """The status line waits for the first chunk: until then an error can still have a status of its own."""
        async for chunk in chunks:
            if not self._streams:
                self._streams = True
                headers = MutableHeaders(STREAM_HEADERS).raw
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, error: ApiError) -> None:
        """Instead of an answer, or after the beginning of a stream."""
        if self._streams:
            await self._send({"type": "http.response.body", "body": error_event(error)})
        else:
            await error.response()(self._scope, self._receive, self._send)


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """One request that has its place."""

    shared: ModelRequests
    request: Request
    context: RequestContext
    reply: Reply
    places: ExitStack

    def take_places(self, count: int) -> None:
        """So many more: whoever asks for several answers leaves less room. Raises ApiError where there is none."""
        most = self.context.settings.max_concurrent_requests
        for _ in range(count):
            self.places.enter_context(self.shared.admission.place(self.context.caller.name, places=most))

    @asynccontextmanager
    async def body(self, fields: type[Fields]) -> AsyncIterator[Fields]:
        """The body's fields; what they and all that is made of them take is given back when the block ends. Raises
        ApiError."""
        try:
            yield await read_fields(self.request, self.context.settings, self.context.body, fields)
        finally:
            self.context.body.give_back()


Work = Callable[[Admitted], Awaitable[None]]


class ModelAnswer(Response):
    """Does all its work while it is being sent, in one coroutine: whatever ends it, everything is given back."""

    def __init__(self, shared: ModelRequests, request: Request, work: Work) -> None:
        super().__init__()
        self._shared, self._request, self._work = shared, request, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply, meter = Reply(scope, receive, send), Meter(self._shared.metrics, record_of(scope))
        with self._shared.drain.at_work():  # until the last byte, of an error too
            try:
                with meter.settled(), suppress(ClientDisconnect):  # in the middle of its body
                    await self._admit(meter, reply)
            except ApiError as error:
                await reply.error(error)
            except Exception:
                log.exception("a request failed in a way nobody foresaw")
                await reply.error(ApiError("internal_error", "the server failed on this request"))

    async def _admit(self, meter: Meter, reply: Reply) -> None:
        """What a request holds counts until its answer has ended: engines keep pixels as long, and Ray the job."""
        shared, settings, caller = self._shared, self._shared.live.current, self._request.state.caller
        async with shared.drain.request():
            with ExitStack() as places:
                places.enter_context(shared.admission.place(caller.name, places=settings.max_concurrent_requests))
                shared.shadows.make_way(settings)
                context = RequestContext(
                    settings=settings,
                    caller=caller,
                    record=record_of(self._request.scope),
                    meter=meter,
                    body=places.enter_context(shared.admission.memory.share(caller.name)),
                    held=places.enter_context(shared.admission.memory.share(caller.name)),
                    strength_header=self._request.headers.get(STRENGTH_HEADER),
                )
                async with _within(settings.request_timeout_s):
                    await self._work(
                        Admitted(shared=shared, request=self._request, context=context, reply=reply, places=places)
                    )


@asynccontextmanager
async def _within(limit_s: float) -> AsyncIterator[None]:
    """Raises ApiError where what stands in here takes longer."""
    try:
        async with asyncio.timeout(limit_s) as clock:
            yield
    except TimeoutError:
        if not clock.expired():
            raise
        raise ApiError("request_timeout", f"a request may take {limit_s:g} s; ask for less, or later") from None
