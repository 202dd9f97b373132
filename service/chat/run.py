"""One chat request without its HTTP: `take_in` makes a job of a body, `run` makes events of a job."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from service.callers.access import Access
from service.callers.keys import Caller
from service.callers.ledger import AnswerLabels
from service.callers.ledger_client import LedgerClient
from service.chat.admission import Share
from service.chat.body_structure import check_structure
from service.chat.request import make_job
from service.chat.schemas import ChatCompletionRequest
from service.errors import ApiError, from_validation_error
from service.images.decoder import ImageDecoder
from service.images.remote import RemoteImages
from service.metrics.meter import Meter
from service.metrics.request_record import RequestRecord
from service.metrics.tracing import Tracing
from service.model.client import Answer, ModelClient
from service.model.job import ModelJob
from service.model.replica import AnswerStart
from service.settings import BYTES_PER_PIXEL, MIB, Settings
from steering.engines.base import GenerationEnd

log = logging.getLogger(__name__)
Parsed = TypeVar("Parsed", bound=BaseModel)
LOGPROB_BYTES = 256
"""One logprob in JSON is 60 to 150 bytes with common tokens; it is kept, and stands once more in the answer."""
WIDE_COPIES = 3
"""A text with one character from outside the basic plane takes four bytes for each of its characters."""


class AnswerShape(NamedTuple):
    """What of a request is needed to write its answer; the conversation is not."""

    model: str
    """The model id as the client wrote it."""
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


@dataclass(frozen=True, kw_only=True)
class ChatRunner:
    """What the work on all chat requests shares."""

    model: ModelClient
    decoder: ImageDecoder
    remote: RemoteImages
    access: Access
    ledger: LedgerClient
    tracing: Tracing

    async def take_in(
        self,
        body: bytes,
        settings: Settings,
        *,
        strength_header: str | None,
        unit_header: str | None,
        caller: Caller,
        meter: Meter,
        record: RequestRecord,
        body_share: Share,
        held: Share,
    ) -> tuple[ModelJob, AnswerShape]:
        """What was asked, checked. `body_share` is told what is made of the body on the way, `held` what stays."""

        async def admit_images(count: int, total_pixels: int) -> None:
            held.take(BYTES_PER_PIXEL * total_pixels)
            await self.access.admit_images(caller, count, total_pixels)

        if not body.isascii() or b"\\u" in body:
            body_share.take(WIDE_COPIES * len(body))
        chat = await parse_body(body)
        with self.tracing.step(record, "images"):
            job = await make_job(
                chat,
                request_id=f"chatcmpl-{uuid.uuid4().hex}",
                strength_header=strength_header,
                unit_header=unit_header,
                assigned=meter.assigned,
                settings=settings,
                decoder=self.decoder,
                remote=self.remote,
                caller=caller,
                admit_images=admit_images,
                take_bytes=body_share.take,
            )
        for image in job.images:
            meter.count_image(image.width * image.height)
        record.completion_id, record.stream = job.request_id, bool(chat.stream)
        shape = AnswerShape.of(chat, settings)
        held.take(shape.kept_bytes)
        return job, shape

    async def run(
        self, job: ModelJob, *, caller: Caller, meter: Meter, record: RequestRecord
    ) -> AsyncGenerator[Answer, None]:
        """AnswerStart, then the engine's events, measured; before the end is told, feedback on it can be given.

        Raises ApiError. Closing it cancels the generation.
        """
        answer_id, answer = job.request_id, self.model.generate(job)
        del job  # once the model has the pixels, they are not held here, too
        meter.submitted()
        async with aclosing(answer):
            with self.tracing.step(record, "queue"):
                start = await anext(answer)
            assert isinstance(start, AnswerStart)
            meter.started(start.prompt_tokens)
            yield start
            with self.tracing.step(record, "generation"):
                async for event in answer:
                    assert not isinstance(event, AnswerStart)
                    meter.observe(event)
                    if isinstance(event, GenerationEnd):
                        await self._remember(answer_id, caller, event, record.arm)
                    yield event

    async def _remember(self, answer_id: str, caller: Caller, end: GenerationEnd, arm: str) -> None:
        """An answer on which no feedback can be given is still an answer."""
        try:
            await self.ledger.record_answer(answer_id, caller.name, AnswerLabels.of(end.receipt, arm))
        except ApiError as error:
            log.warning("feedback on an answer will not be accepted: %s", error.message)


async def parse_body(body: bytes) -> ChatCompletionRequest:
    """See parse_as."""
    return await parse_fairly(ChatCompletionRequest, body)


async def parse_fairly(kind: type[Parsed], body: bytes) -> Parsed:
    """See parse_as; a large body in a thread, so that others are served between the steps of its work."""
    if len(body) <= MIB:
        return parse_as(kind, body)
    return await asyncio.to_thread(parse_as, kind, body)


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """See parse_as."""
    return parse_as(ChatCompletionRequest, body)


def parse_as(kind: type[Parsed], body: bytes) -> Parsed:
    """Raises ApiError naming the first field at fault."""
    check_structure(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation_error(error) from None
