"""`POST /v1/chat/completions`, from its first byte to its last: admitted, read, run (`chat/request.py`), written."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import cast

from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.chat.admission import Admission, Share
from service.chat.request import ChatRunner
from service.chat.schemas import ChatCompletionRequest
from service.chat.shadow import Shadows
from service.chat.steering_sources import STRENGTH_HEADER
from service.chat.streaming import AnswerHead, AnswerShape, Event, completion_json, error_event, event_stream
from service.draining import Drain
from service.errors import ApiError
from service.http.body import read_fields
from service.live_settings import LiveSettings
from service.metrics.meter import Meter, Metrics
from service.metrics.request_record import record_of
from service.model.job import ModelJob
from service.model.replica import AnswerStart

log = logging.getLogger(__name__)
UNIT_HEADER = "x-experiment-unit"
UNIT = re.compile(r"[!-~]([ -~]{0,254}[!-~])?")
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChatRoute:
    """What all requests share."""

    live: LiveSettings
    runner: ChatRunner
    admission: Admission
    drain: Drain
    metrics: Metrics
    shadows: Shadows

    async def answer(self, request: Request) -> Response:
        return ChatAnswer(self, request)


@asynccontextmanager
async def within(limit_s: float) -> AsyncIterator[None]:
    """Raises ApiError where what stands in here takes longer."""
    try:
        async with asyncio.timeout(limit_s) as clock:
            yield
    except TimeoutError:
        if not clock.expired():
            raise
        raise ApiError("request_timeout", f"a request may take {limit_s:g} s; ask for less, or later") from None


class ChatAnswer(Response):
    """Does all its work while it is being sent, in one coroutine: whatever ends it, everything is given back."""

    def __init__(self, route: ChatRoute, request: Request) -> None:
        super().__init__()
        self._route, self._request = route, request
        self._settings = route.live.current
        self._caller = request.state.caller
        self._record = record_of(request.scope)
        self._meter = Meter(route.metrics, self._record)
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure: str | None = "cancelled"
        places = self._settings.max_concurrent_requests
        with self._route.drain.at_work():  # until the last byte, of an error too
            try:
                async with self._route.drain.request():
                    with self._route.admission.place(self._caller.name, places=places):
                        if self._route.shadows.running:
                            self._route.shadows.make_way(self._settings)
                        async with within(self._settings.request_timeout_s):
                            await self._answer(scope, receive, send)
                failure = None
            except ApiError as error:
                failure = error.code
                await self._fail(error, scope, receive, send)
            except ClientDisconnect:
                pass  # in the middle of its body
            except Exception:
                log.exception("a chat request failed in a way nobody foresaw")
                failure = "internal_error"
                await self._fail(ApiError(failure, "the server failed on this request"), scope, receive, send)
            finally:
                self._meter.finished(failure)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What a request holds counts until its answer has ended: engines keep pixels as long, and Ray the job."""
        with self._route.admission.memory.share(self._caller.name) as held:
            job, shape = await self._take_in(held)
            answer_id, shadow, experiment = job.request_id, None, self._settings.experiment
            if experiment is not None and experiment.shadow is not None:
                shadow = self._route.shadows.plan(job, self._settings, self._record)
            answer = self._route.runner.run(job, caller=self._caller, meter=self._meter, record=self._record)
            del job  # its pixels
            try:
                async with aclosing(answer):
                    start = await anext(answer)
                    assert isinstance(start, AnswerStart)
                    head = AnswerHead(
                        id=answer_id,
                        created=int(time.time()),
                        model=shape.model,
                        system_fingerprint=start.system_fingerprint,
                    )
                    events = cast(AsyncGenerator[Event, None], answer)  # after its start
                    await self._write(shape, head, shadow.watching(events) if shadow else events, scope, receive, send)
                if shadow:
                    self._route.shadows.start(shadow, self._settings)
            finally:
                if shadow:
                    self._route.shadows.drop(shadow)

    async def _take_in(self, held: Share) -> tuple[ModelJob, AnswerShape]:
        """The body and all that was made of it on the way ends here."""
        unit_header = unit_header_of(self._request.headers)
        with self._route.admission.memory.share(self._caller.name) as body_share:
            chat = await read_fields(self._request, self._settings, body_share, ChatCompletionRequest)
            shape = AnswerShape.of(chat, self._settings)
            job = await self._route.runner.take_in(
                chat,
                self._settings,
                strength_header=self._request.headers.get(STRENGTH_HEADER),
                unit_header=unit_header,
                caller=self._caller,
                meter=self._meter,
                record=self._record,
                body_share=body_share,
                held=held,
            )
            held.take(shape.kept_bytes)
            return job, shape

    async def _write(
        self,
        shape: AnswerShape,
        head: AnswerHead,
        events: AsyncGenerator[Event, None],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """The answer as it comes, or when it is whole."""
        if not shape.stream:
            body = await completion_json(head, events, n=shape.n, logprobs=shape.logprobs)
            await Response(body, media_type="application/json")(scope, receive, send)
            return
        options = {"n": shape.n, "logprobs": shape.logprobs, "include_usage": shape.include_usage}
        async for chunk in event_stream(head, events, **options):
            await self._send(send, chunk)
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, chunk: bytes) -> None:
        """The status line waits for the first chunk: until then an error can still have a status of its own."""
        if not self._started:
            self._started = True
            raw = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._started:
            await send({"type": "http.response.body", "body": error_event(error)})
        else:
            await error.response()(scope, receive, send)


def unit_header_of(headers: Headers) -> str | None:
    """Raises ApiError for more than one, and for what no identifier needs."""
    given = headers.getlist(UNIT_HEADER)
    if len(given) > 1 or not all(UNIT.fullmatch(one) for one in given):
        raise ApiError(
            "invalid_header",
            f"{UNIT_HEADER}: send one of at most 256 printable ASCII characters, or none",
            param=UNIT_HEADER,
        )
    return given[0] if given else None
