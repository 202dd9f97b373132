"""From a validated body to a ModelJob: limits, model aliases, steering sources, images. No Ray, no HTTP responses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from service.callers.keys import Caller
from service.chat.schemas import AssistantMessage, ChatCompletionRequest, ImagePart, SchemaFormat
from service.errors import ApiError
from service.experiments.arms import over_default
from service.experiments.assignment import Assignment, assign
from service.images.decoder import ImageDecoder
from service.images.intake import AdmitImages, take_images
from service.images.remote import RemoteImages
from service.model.job import ModelJob, Turn
from service.settings import MIB, Settings
from steering.engines.base import ResponseFormat, Sampling
from steering.request import RequestedSteering, SteeringRequest, merge_sources

MAX_TEXT_BYTES = MIB
"""All texts of a conversation together, in UTF-8; for most models the context is the tighter limit."""
STRENGTH_HEADER = "x-steering-strength"
ALIASES = {"": SteeringRequest(), ":off": SteeringRequest(enabled=False), ":steered": SteeringRequest(enabled=True)}
"""Suffix of the model id to what it asks for."""
DECIMAL = re.compile(r"\d{1,3}(\.\d{1,9})?|\.\d{1,9}")


async def make_job(
    request: ChatCompletionRequest,
    *,
    request_id: str,
    strength_header: str | None,
    settings: Settings,
    decoder: ImageDecoder,
    remote: RemoteImages,
    caller: Caller,
    admit_images: AdmitImages,
    take_bytes: Callable[[int], None] = lambda _count: None,
    unit_header: str | None = None,
    assigned: Callable[[Assignment], None] = lambda _assignment: None,
) -> ModelJob:
    """Everything is checked before the first image is decoded. `assigned` is told what an experiment means for it."""
    job = plan_job(
        request,
        request_id=request_id,
        strength_header=strength_header,
        settings=settings,
        caller=caller,
        unit_header=unit_header,
        assigned=assigned,
    )
    images = await take_images(
        image_parts(request),
        settings=settings,
        decoder=decoder,
        remote=remote,
        admit_images=admit_images,
        take_bytes=take_bytes,
        caller=caller.name,
    )
    return replace(job, images=images)


def plan_job(
    request: ChatCompletionRequest,
    *,
    request_id: str,
    strength_header: str | None,
    settings: Settings,
    caller: Caller,
    unit_header: str | None = None,
    assigned: Callable[[Assignment], None] = lambda _assignment: None,
) -> ModelJob:
    """A job without its pixels: all that can be checked without them."""
    alias = find_alias(request.model, settings.model_name)
    assignment = assignment_of(request, strength_header, alias, unit_header, settings, caller)
    if assignment is not None:
        assigned(assignment)
    steering = merge_steering(request.steering, strength_header, alias, settings, assignment)
    check_limits(request, settings)
    check_scopes(request, caller)
    return ModelJob(
        request_id=request_id,
        turns=turns_of(request),
        images=(),
        max_tokens_field="max_completion_tokens" if request.max_completion_tokens else "max_tokens",
        max_tokens=request.max_completion_tokens or request.max_tokens,
        sampling=sampling_of(request),
        steering=steering,
        tenant=caller.name,
    )


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
    asked = request.steering is not None and bool(request.steering.model_dump(exclude_none=True))
    own = asked or strength_header is not None or alias != ""
    user = unit_header or request.user
    unit = f"{caller.name}:{user}" if user else None
    return assign(settings.experiment, unit=unit, own_steering=own)


def merge_steering(
    body: SteeringRequest | None,
    strength_header: str | None,
    alias: str,
    settings: Settings,
    assignment: Assignment | None = None,
) -> RequestedSteering:
    """Body, header and alias, or else the arm, over the server's default: a caller's own steering is in no arm."""
    body = body or SteeringRequest()
    for name in ("concepts", "explain"):
        if getattr(body, name):
            raise ApiError(
                "unsupported_value", f"steering.{name}: not supported yet; leave it out", param=f"steering.{name}"
            )
    if body.control not in (None, "none") and not settings.allow_controls:
        raise ApiError(
            "unsupported_value",
            "steering.control: controls are for evaluation; this server was not started with --allow-controls on",
            param="steering.control",
        )
    default = SteeringRequest(preset=settings.default_preset, strength=settings.default_strength)
    if assignment is not None and assignment.arm is not None:
        return over_default(assignment.arm.steering, default, arm=assignment.shown)
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
    if (asked := text_bytes(request)) > MAX_TEXT_BYTES:
        raise ApiError(
            "request_too_large",
            f"messages: the texts together have {asked} bytes; at most {MAX_TEXT_BYTES} are allowed",
            param="messages",
        )


def check_scopes(request: ChatCompletionRequest, caller: Caller) -> None:
    """What not every key may ask for."""
    control = request.steering and request.steering.control
    if control not in (None, "none") and "evaluate" not in caller.scopes:
        raise ApiError(
            "permission_denied",
            "steering.control: needs a key with the scope 'evaluate'",
            param="steering.control",
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


def text_bytes(request: ChatCompletionRequest) -> int:
    """Length of all texts together, in bytes of UTF-8."""
    return sum(len(part.encode()) for turn in turns_of(request) for part in turn.parts if part is not None)


def image_parts(request: ChatCompletionRequest) -> list[tuple[str, str]]:
    """(path of the field, URL) of every image."""
    return [
        (f"messages[{message_index}].content[{part_index}].image_url.url", part.image_url.url)
        for message_index, message in enumerate(request.messages)
        if isinstance(message.content, list)
        for part_index, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
