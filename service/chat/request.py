"""One chat request without its HTTP: `take_in` makes a job of what was asked, `run` makes events of a job.

Everything is checked before the first image is decoded: limits, model aliases, steering sources, scopes.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from service.callers.keys import Caller, Scope
from service.callers.ledger import AnswerLabels, Ledger, RayLedger, charge
from service.chat.admission import Share
from service.chat.schemas import AssistantMessage, ChatCompletionRequest, ImagePart, SchemaFormat
from service.concepts.names import ConceptNames
from service.errors import ApiError
from service.experiments.arms import over_default
from service.experiments.assignment import Assignment, assign
from service.images.decoder import ImageDecoder, take_images
from service.images.remote import RemoteImages
from service.metrics.meter import Meter
from service.metrics.request_record import RequestRecord, Tracing
from service.model.client import Answer, ModelClient
from service.model.job import ModelJob, Turn
from service.model.replica import AnswerStart
from service.settings import BYTES_PER_PIXEL, MIB, Settings
from steering.engines.base import GenerationEnd, ResponseFormat, Sampling
from steering.request import RequestedSteering, SteeringRequest, merge_sources

log = logging.getLogger(__name__)
MAX_TEXT_BYTES = MIB
"""All texts of a conversation together, in UTF-8; for most models the context is the tighter limit."""
STRENGTH_HEADER = "x-steering-strength"
ALIASES = {"": SteeringRequest(), ":off": SteeringRequest(enabled=False), ":steered": SteeringRequest(enabled=True)}
"""Suffix of the model id to what it asks for."""
DECIMAL = re.compile(r"\d{1,3}(\.\d{1,9})?|\.\d{1,9}")


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

    async def take_in(
        self,
        chat: ChatCompletionRequest,
        settings: Settings,
        *,
        strength_header: str | None,
        unit_header: str | None,
        caller: Caller,
        meter: Meter,
        record: RequestRecord,
        body_share: Share,
        held: Share,
    ) -> ModelJob:
        """What was asked, checked. `body_share` is told what is fetched on the way, `held` what stays."""
        alias = find_alias(chat.model, settings.model_name)
        assignment = assignment_of(chat, strength_header, alias, unit_header, settings, caller)
        if assignment is not None:
            meter.assigned(assignment)
        steering = merge_steering(chat.steering, strength_header, alias, settings, assignment)
        record.artifact = artifact_of(settings, assignment)
        if steering.settings.concepts:
            steering = await self.names.by_id(steering, record.artifact)
        check_limits(chat, settings)
        check_scopes(chat, caller)

        async def admit_images(count: int, total_pixels: int) -> None:
            held.take(BYTES_PER_PIXEL * total_pixels)
            await charge(self.ledger, caller, images=count, pixels=total_pixels)

        with self.tracing.step(record, "images"):
            images = await take_images(
                image_parts(chat),
                settings=settings,
                decoder=self.decoder,
                remote=self.remote,
                admit_images=admit_images,
                take_bytes=body_share.take,
                caller=caller.name,
            )
        record.completion_id, record.stream = f"chatcmpl-{uuid.uuid4().hex}", bool(chat.stream)
        return ModelJob(
            request_id=record.completion_id,
            turns=turns_of(chat),
            images=images,
            max_tokens_field="max_completion_tokens" if chat.max_completion_tokens else "max_tokens",
            max_tokens=chat.max_completion_tokens or chat.max_tokens,
            sampling=sampling_of(chat),
            steering=steering,
            tenant=caller.name,
            artifact=record.artifact,
        )

    async def run(
        self, job: ModelJob, *, caller: Caller, meter: Meter, record: RequestRecord
    ) -> AsyncGenerator[Answer, None]:
        """AnswerStart, then the engine's events, measured; before the end is told, feedback on it can be given.

        Raises ApiError. Closing it cancels the generation.
        """
        for image in job.images:
            meter.count_image(image.width * image.height)
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
                        if event.receipt.explanation:
                            event = await self.names.with_labels(event)
                        await self._remember(answer_id, caller, event, record.arm)
                    yield event

    async def _remember(self, answer_id: str, caller: Caller, end: GenerationEnd, arm: str) -> None:
        """An answer on which no feedback can be given is still an answer."""
        try:
            await self.ledger.record_answer(answer_id, caller.name, AnswerLabels.of(end.receipt, arm))
        except ApiError as error:
            log.warning("feedback on an answer will not be accepted: %s", error.message)


def find_alias(model: str, served: str) -> str:
    """The suffix of a known model id; anything else is a 404."""
    for alias in ALIASES:
        if model == served + alias:
            return alias
    known = ", ".join(repr(served + alias) for alias in ALIASES)
    raise ApiError("model_not_found", f"model: there is no model {model[:200]!r}; there are {known}", param="model")


def assignment_of(
    request: ChatCompletionRequest,
    strength_header: str | None,
    alias: str,
    unit_header: str | None,
    settings: Settings,
    caller: Caller,
) -> Assignment | None:
    """None where no experiment runs. The unit is the key and, of that key, the header's or else the body's user."""
    if settings.experiment is None:
        return None
    asked = request.steering is not None and bool(request.steering.model_dump(exclude_none=True, exclude={"explain"}))
    own = asked or strength_header is not None or alias != ""
    user = unit_header or request.user
    unit = f"{caller.name}:{user}" if user else None
    return assign(settings.experiment, unit=unit, own_steering=own)


def artifact_of(settings: Settings, assignment: Assignment | None) -> str:
    """The name of the artifact that answers: the arm's, or else the server's default."""
    arm = assignment and assignment.arm
    return (arm and arm.artifact) or settings.default_artifact


def merge_steering(
    body: SteeringRequest | None,
    strength_header: str | None,
    alias: str,
    settings: Settings,
    assignment: Assignment | None = None,
) -> RequestedSteering:
    """Body, header and alias, or else the arm, over the server's default: a caller's own steering is in no arm."""
    body = body or SteeringRequest()
    if body.control not in (None, "none") and not settings.allow_controls:
        raise ApiError(
            "unsupported_value",
            "steering.control: controls are for evaluation; this server was not started with --allow-controls on",
            param="steering.control",
        )
    default = SteeringRequest(preset=settings.default_preset, strength=settings.default_strength)
    if assignment is not None and assignment.arm is not None:
        asked = over_default(assignment.arm.steering, default, arm=assignment.shown)
        return replace(asked, settings=asked.settings.model_copy(update={"explain": body.explain}))
    if body.preset is not None:
        default = SteeringRequest()  # a default strength belongs to the default preset
    arm = assignment and assignment.shown
    return merge_sources(body, _from_header(strength_header), ALIASES[alias], server=(default,), arm=arm)


def _from_header(value: str | None) -> SteeringRequest:
    if value is None:
        return SteeringRequest()
    if not DECIMAL.fullmatch(value.strip()) or not 0 <= float(value) <= 1:
        raise ApiError(
            "invalid_header", f"{STRENGTH_HEADER}: must be a number from 0 to 1, such as 0.5", param=STRENGTH_HEADER
        )
    return SteeringRequest(strength=float(value))


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


def check_scopes(request: ChatCompletionRequest, caller: Caller) -> None:
    """What not every key may ask for."""
    asked = request.steering or SteeringRequest()
    wanted: list[tuple[str, object, Scope]] = [
        ("explain", asked.explain, "explain"),
        ("concepts", asked.concepts, "explain"),
        ("control", asked.control not in (None, "none"), "evaluate"),
    ]
    for field, value, scope in wanted:
        if value and scope not in caller.scopes:
            raise ApiError(
                "permission_denied",
                f"steering.{field}: needs a key with the scope '{scope}'",
                param=f"steering.{field}",
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
