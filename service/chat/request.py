"""One chat request without its HTTP: `take_in` makes a job of what was asked, `run` makes events of a job.

Everything is checked before the first image is decoded: limits, model aliases, steering sources, scopes.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from service.callers.keys import Caller
from service.callers.ledger import AnswerLabels, Ledger, RayLedger, charge
from service.chat.admission import Share
from service.chat.schemas import AssistantMessage, ChatCompletionRequest, ImagePart, SchemaFormat
from service.chat.steering_sources import artifact_of, assignment_of, check_scopes, find_alias, merge_steering
from service.concepts.names import ConceptNames
from service.errors import ApiError
from service.images.decoder import ImageDecoder, RgbImage, take_images
from service.images.remote import RemoteImages
from service.metrics.meter import Meter
from service.metrics.request_record import RequestRecord, Tracing
from service.model.client import Answer, ModelClient
from service.model.job import ModelJob, Turn
from service.model.replica import AnswerStart
from service.settings import BYTES_PER_PIXEL, MIB, Settings
from steering.engines.base import GenerationEnd, ResponseFormat, Sampling

log = logging.getLogger(__name__)
MAX_TEXT_BYTES = MIB
"""All texts of a conversation together, in UTF-8; for most models the context is the tighter limit."""


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """One request as all who work on it see it: whose it is, what is in force for it, what it holds, how it is told."""

    settings: Settings
    caller: Caller
    record: RequestRecord
    meter: Meter
    body: Share
    """Of all requests' memory: what the body takes, and what is fetched for it, until a job is made of it."""
    held: Share
    """What stays until the answer has ended."""
    strength_header: str | None = None
    unit_header: str | None = None


@dataclass(frozen=True, kw_only=True)
class ChatRunner:
    """What the work on all chat requests shares."""

    model: ModelClient
    decoder: ImageDecoder
    remote: RemoteImages | None
    """None: images come as data: URLs only."""
    names: ConceptNames
    ledger: Ledger | RayLedger
    tracing: Tracing

    async def take_in(self, chat: ChatCompletionRequest, context: RequestContext) -> ModelJob:
        """What was asked, checked. Raises ApiError."""
        job = await self.plan(chat, context)
        images = await self.decode(image_parts(chat), context)
        record = context.record
        record.completion_id, record.stream, record.artifact = job.request_id, bool(chat.stream), job.artifact
        return replace(job, images=images)

    async def plan(self, chat: ChatCompletionRequest, context: RequestContext) -> ModelJob:
        """A job without its pixels: all that can be checked without them. Raises ApiError."""
        settings, caller, strength = context.settings, context.caller, context.strength_header
        alias = find_alias(chat.model, settings.model_name)
        assignment = assignment_of(chat, strength, alias, context.unit_header, settings, caller)
        if assignment is not None:
            context.meter.assigned(assignment)
        steering = merge_steering(chat.steering, strength, alias, settings, assignment)
        artifact = artifact_of(settings, assignment)
        if steering.settings.concepts:
            steering = await self.names.by_id(steering, artifact)
        check_limits(chat, settings)
        check_scopes(chat, caller)
        return ModelJob(
            request_id=f"chatcmpl-{uuid.uuid4().hex}",
            turns=turns_of(chat),
            images=(),
            max_tokens_field="max_completion_tokens" if chat.max_completion_tokens else "max_tokens",
            max_tokens=chat.max_completion_tokens or chat.max_tokens,
            sampling=sampling_of(chat),
            steering=steering,
            tenant=caller.name,
            artifact=artifact,
        )

    async def decode(
        self, sources: Sequence[tuple[str, str]], context: RequestContext, *, copies: int = 1
    ) -> tuple[RgbImage, ...]:
        """Pixels of every (field, URL), charged and counted once; `copies` of them travel to the model."""

        async def admit_images(count: int, total_pixels: int) -> None:
            held_bytes = copies * BYTES_PER_PIXEL * total_pixels
            if copies > 1 and held_bytes > context.settings.max_memory_bytes // 2:  # never will there be room
                message = (
                    f"messages: {total_pixels} pixels are too many for {copies} answers; send less, or ask for fewer"
                )
                raise ApiError("request_too_large", message, param="messages")
            context.held.take(held_bytes)
            await charge(self.ledger, context.caller, images=count, pixels=total_pixels)

        with self.tracing.step(context.record, "images"):
            images = await take_images(
                sources,
                settings=context.settings,
                decoder=self.decoder,
                remote=self.remote,
                admit_images=admit_images,
                take_bytes=context.body.take,
                caller=context.caller.name,
            )
        for image in images:
            context.meter.count_image(image.width * image.height)
        return images

    async def run(self, job: ModelJob, context: RequestContext) -> AsyncGenerator[Answer, None]:
        """AnswerStart, then the engine's events, measured; before the end is told, feedback on it can be given.

        Raises ApiError. Closing it cancels the generation.
        """
        answer_id, answer, meter = job.request_id, self.model.generate(job), context.meter
        del job  # once the model has the pixels, they are not held here, too
        meter.submitted()
        async with aclosing(answer):
            with self.tracing.step(context.record, "queue"):
                start = await anext(answer)
            assert isinstance(start, AnswerStart)
            meter.started(start.prompt_tokens)
            yield start
            with self.tracing.step(context.record, "generation"):
                async for event in answer:
                    assert not isinstance(event, AnswerStart)
                    meter.observe(event)
                    if isinstance(event, GenerationEnd):
                        if event.receipt.explanation:
                            event = await self.names.with_labels(event)
                        await self._remember(answer_id, event, context)
                    yield event

    async def _remember(self, answer_id: str, end: GenerationEnd, context: RequestContext) -> None:
        """An answer on which no feedback can be given is still an answer."""
        try:
            labels = AnswerLabels.of(end.receipt, context.record.arm)
            await self.ledger.record_answer(answer_id, context.caller.name, labels)
        except ApiError as error:
            log.warning("feedback on an answer will not be accepted: %s", error.message)


def check_limits(request: ChatCompletionRequest, settings: Settings) -> None:
    """What settings bound."""
    if (request.n or 1) > settings.max_choices:
        raise ApiError("invalid_value", f"n: at most {settings.max_choices} choices are allowed", param="n")
    for name in ("max_tokens", "max_completion_tokens"):
        if (getattr(request, name) or 0) > settings.max_tokens_limit:
            raise ApiError("invalid_value", f"{name}: at most {settings.max_tokens_limit} are allowed", param=name)
    if len(image_parts(request)) > settings.max_images:
        raise ApiError("invalid_value", f"messages: at most {settings.max_images} images are allowed", param="messages")
    texts = [part for turn in turns_of(request) for part in turn.parts if part is not None]
    if (asked := sum(len(text.encode()) for text in texts)) > MAX_TEXT_BYTES:
        raise ApiError(
            "request_too_large",
            f"messages: the texts together have {asked} bytes; at most {MAX_TEXT_BYTES} are allowed",
            param="messages",
        )


def sampling_of(request: ChatCompletionRequest) -> Sampling:
    """How tokens are chosen, OpenAI's defaults filled in."""
    top_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return Sampling(
        max_tokens=1,  # a placeholder: the model replica knows what fits
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=request.top_p or 1.0,
        top_k=1 if request.top_p == 0 else max(request.top_k or 0, 0),
        seed=request.seed,
        stop=tuple(request.stop or ()),
        n=request.n or 1,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        top_logprobs=top_logprobs,
        response_format=response_format_of(request),
    )


def response_format_of(request: ChatCompletionRequest) -> ResponseFormat | None:
    """What shape the text must have, if any."""
    asked = request.response_format
    if asked is None or asked.type == "text":
        return None
    return ResponseFormat(json_schema=asked.json_schema.canonical if isinstance(asked, SchemaFormat) else None)


def turns_of(request: ChatCompletionRequest) -> tuple[Turn, ...]:
    """The conversation without its pixels."""
    turns = []
    for message in request.messages:
        role = "system" if message.role == "developer" else message.role
        content = message.content
        if isinstance(message, AssistantMessage):
            content = content or message.refusal or ""
        parts = (
            (content,)
            if isinstance(content, str)
            else tuple(None if isinstance(part, ImagePart) else part.text for part in content or ())
        )
        turns.append(Turn(role, parts))
    return tuple(turns)


def image_parts(request: ChatCompletionRequest) -> list[tuple[str, str]]:
    """(path of the field, URL) of every image."""
    return [
        (f"messages[{message_index}].content[{part_index}].image_url.url", part.image_url.url)
        for message_index, message in enumerate(request.messages)
        if isinstance(message.content, list)
        for part_index, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
