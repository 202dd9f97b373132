"""One chat request from its first byte to its last: admitted, read, checked, answered, measured."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from fastapi import Request, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.access import Access
from service.body_structure import check_structure
from service.chat_job import ChatJob
from service.chat_request import STRENGTH_HEADER, make_job
from service.draining import Drain
from service.errors import ApiError, from_validation_error
from service.feedback import labels_of
from service.images import ImageDecoder
from service.keys import Caller
from service.ledger_client import LedgerClient
from service.load_estimate import LoadEstimate
from service.memory_budget import MemoryBudget, Share
from service.metrics import Meter, Metrics
from service.model_client import Answer, ModelClient
from service.model_replica import AnswerStart
from service.remote_images import RemoteImages
from service.request_body import read_json_body
from service.request_record import record_of
from service.schemas import ChatCompletionRequest
from service.settings import BYTES_PER_PIXEL, COPIES_OF_A_BODY, MIB, Settings
from service.streaming import AnswerHead, Event, completion_json, error_event, event_stream
from service.tracing import Tracing
from steering.engines.base import GenerationEnd

log = logging.getLogger(__name__)
LOGPROB_BYTES = 256
"""One logprob in JSON is 60 to 150 bytes with common tokens; it is kept, and stands once more in the answer."""
WIDE_COPIES = 3
"""A text with one character from outside the basic plane takes four bytes for each of its characters."""
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class AnswerShape(NamedTuple):
    """What of a request is needed to write its answer; the conversation is not."""

    model: str
    stream: bool
    include_usage: bool
    n: int
    logprobs: bool
    kept_bytes: int
    """Most that is kept of the answer until it is whole. Without logprobs that is next to nothing."""

    @classmethod
    def of(cls, chat: ChatCompletionRequest, settings: Settings) -> AnswerShape:
        n, tokens = chat.n or 1, chat.max_completion_tokens or chat.max_tokens or settings.default_max_tokens
        logprobs = n * tokens * (1 + (chat.top_logprobs or 0)) if chat.logprobs and not chat.stream else 0
        return cls(
            model=chat.model,
            stream=bool(chat.stream),
            include_usage=bool(chat.stream_options and chat.stream_options.include_usage),
            n=n,
            logprobs=bool(chat.logprobs),
            kept_bytes=LOGPROB_BYTES * logprobs,
        )


@dataclass(kw_only=True)
class ChatService:
    """What all requests share."""

    settings: Settings
    model: ModelClient
    decoder: ImageDecoder
    remote: RemoteImages
    metrics: Metrics
    tracing: Tracing
    drain: Drain
    access: Access
    memory: MemoryBudget
    ledger: LedgerClient
    load: LoadEstimate = field(default_factory=LoadEstimate)
    in_progress: int = 0
    in_progress_of: Counter[str] = field(default_factory=Counter)
    """By the caller's name."""

    @contextmanager
    def admitted(self, caller: Caller) -> Iterator[None]:
        """A place among the requests being worked on, or 503 before a byte of the body is read. Of callers that are
        told apart by keys none gets more than half."""
        places, of_caller = self.settings.max_concurrent_requests, self.in_progress_of[caller.name]
        if self.in_progress >= places:
            raise ApiError("overloaded", "too many requests at once; try again later")
        if caller.name and of_caller >= (places + 1) // 2:
            raise ApiError("overloaded", "the key has too many requests at once; try again later")
        self.in_progress += 1
        self.in_progress_of[caller.name] += 1
        self.metrics.in_progress.set(self.in_progress)
        self.load.begin()
        try:
            yield
        finally:
            self.load.end()
            self.in_progress -= 1
            self.in_progress_of[caller.name] -= 1
            self.metrics.in_progress.set(self.in_progress)


class ChatAnswer(Response):
    """Does all its work while it is being sent, in one coroutine: whatever ends it, everything is given back."""

    def __init__(self, service: ChatService, request: Request) -> None:
        super().__init__()
        self._service, self._request = service, request
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        meter = Meter(self._service.metrics, record_of(scope))
        failure: str | None = "cancelled"
        with self._service.drain.at_work():  # until the last byte, of an error too
            try:
                async with self._service.drain.request():
                    with self._service.admitted(scope["state"]["caller"]):
                        await self._answer_in_time(meter, scope, receive, send)
                failure = None
            except ApiError as error:
                failure = error.code
                if error.code == "overloaded":
                    error.retry_after_s = self._service.load.retry_after_s()
                await self._fail(error, scope, receive, send)
            except ClientDisconnect:
                pass  # in the middle of its body
            except Exception:
                log.exception("a chat request failed in a way nobody foresaw")
                failure = "internal_error"
                await self._fail(ApiError(failure, "the server failed on this request"), scope, receive, send)
            finally:
                meter.finished(failure)

    async def _answer_in_time(self, meter: Meter, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._service.settings.request_timeout_s
        try:
            async with asyncio.timeout(limit) as clock:
                await self._answer(meter, scope, receive, send)
        except TimeoutError:
            if not clock.expired():
                raise
            raise ApiError("request_timeout", f"a request may take {limit:g} s; ask for less, or later") from None

    async def _answer(self, meter: Meter, scope: Scope, receive: Receive, send: Send) -> None:
        """What a request holds counts until its answer has ended: engines keep pixels as long, and Ray the job."""
        with self._service.memory.share(scope["state"]["caller"].name) as held:
            job, shape = await self._take_in(held, scope)
            held.take(shape.kept_bytes)
            for image in job.images:
                meter.count_image(image.width * image.height)
            answer_id, answer = job.request_id, self._service.model.generate(job)
            del job  # once the model has the pixels, they are not held here, too
            await self._pass_on(answer_id, answer, shape, meter, scope, receive, send)

    async def _take_in(self, held: Share, scope: Scope) -> tuple[ChatJob, AnswerShape]:
        """What was asked, checked. The body and all that was made of it on the way ends here."""
        service, request, record = self._service, self._request, record_of(scope)
        caller, settings = scope["state"]["caller"], service.settings

        async def admit_images(count: int, total_pixels: int) -> None:
            held.take(BYTES_PER_PIXEL * total_pixels)
            await service.access.admit_images(caller, count, total_pixels)

        with service.memory.share(caller.name) as bodies:
            body = await read_json_body(
                request,
                max_bytes=settings.max_body_bytes,
                timeout_s=settings.body_timeout_s,
                take=lambda piece_bytes: bodies.take(COPIES_OF_A_BODY * piece_bytes),
            )
            if not body.isascii() or b"\\u" in body:
                bodies.take(WIDE_COPIES * len(body))
            chat = await parse_body(body)
            with service.tracing.step(record, "images"):
                job = await make_job(
                    chat,
                    request_id=f"chatcmpl-{uuid.uuid4().hex}",
                    strength_header=request.headers.get(STRENGTH_HEADER),
                    settings=settings,
                    decoder=service.decoder,
                    remote=service.remote,
                    caller=caller,
                    admit_images=admit_images,
                    take_bytes=bodies.take,
                )
        record.completion_id, record.stream = job.request_id, bool(chat.stream)
        return job, AnswerShape.of(chat, settings)

    async def _pass_on(
        self,
        answer_id: str,
        answer: AsyncGenerator[Answer, None],
        shape: AnswerShape,
        meter: Meter,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """The model's answer to the client."""
        service, record, caller = self._service, record_of(scope), scope["state"]["caller"]
        meter.submitted()
        async with aclosing(answer):
            with service.tracing.step(record, "queue"):
                start = await anext(answer)
            assert isinstance(start, AnswerStart)
            meter.started(start.prompt_tokens)
            head = AnswerHead(
                id=answer_id,
                created=int(time.time()),
                model=shape.model,
                system_fingerprint=start.system_fingerprint,
            )
            with service.tracing.step(record, "generation"):
                events = self._observed(answer, meter, caller, answer_id)
                await self._write(shape, head, events, scope, receive, send)

    async def _write(
        self,
        shape: AnswerShape,
        head: AnswerHead,
        events: AsyncIterator[Event],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """The answer as it comes, or when it is whole."""
        n, logprobs = shape.n, shape.logprobs
        if not shape.stream:
            body = await completion_json(head, events, n=n, logprobs=logprobs)
            await Response(body, media_type="application/json")(scope, receive, send)
            return
        async for chunk in event_stream(head, events, n=n, logprobs=logprobs, include_usage=shape.include_usage):
            await self._send(send, chunk)
        await send({"type": "http.response.body", "body": b""})

    async def _observed(
        self, answer: AsyncIterator, meter: Meter, caller: Caller, answer_id: str
    ) -> AsyncIterator[Event]:
        """The answer's events, measured; before its end is told, feedback on it can be given."""
        async for event in answer:
            meter.observe(event)
            if isinstance(event, GenerationEnd):
                await self._record(answer_id, caller, event)
            yield event

    async def _record(self, answer_id: str, caller: Caller, end: GenerationEnd) -> None:
        """An answer that cannot be recorded is still an answer."""
        try:
            await self._service.ledger.record_answer(answer_id, caller.name, labels_of(end.receipt))
        except ApiError as error:
            log.warning("feedback on an answer will not be accepted: %s", error.message)

    async def _send(self, send: Send, chunk: bytes) -> None:
        """The status line waits for the first chunk: until then an error can still have a status of its own."""
        if not self._started:
            self._started = True
            headers = {"content-type": "text/event-stream; charset=utf-8", **STREAM_HEADERS}
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._started:
            await send({"type": "http.response.body", "body": error_event(error)})
        else:
            await error.response()(scope, receive, send)


async def parse_body(body: bytes) -> ChatCompletionRequest:
    """See parse_chat; a large body in a thread, so that others are served between the steps of its work."""
    if len(body) <= MIB:
        return parse_chat(body)
    return await asyncio.to_thread(parse_chat, body)


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """Raises ApiError naming the first field at fault."""
    check_structure(body)
    try:
        return ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise from_validation_error(error) from None
