"""Every error a client can see, in one table, of which the README's and the OpenAPI document's are made.

Knows HTTP status codes and OpenAI's error shape; no routes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pydantic import ValidationError
from starlette.responses import JSONResponse

from steering.errors import BadArtifact, EngineUnavailable, InvalidSteering, SteeringError

NO, LATER, YES = "no", "after `Retry-After`", "yes"
INVALID, SERVER = "invalid_request_error", "server_error"


class ErrorKind(NamedTuple):
    """What an error code means to HTTP, to OpenAI's clients, and, in words, to a client's programmer."""

    status: int
    type: str
    when: str
    remedy: str
    retry: str
    """Whether the same request, sent again, may be answered."""


ERROR_KINDS = {
    "invalid_json": ErrorKind(400, INVALID, "the body is not JSON in UTF-8", "send valid JSON", NO),
    "invalid_value": ErrorKind(400, INVALID,
        "a value of a wrong type, out of its range, or at odds with another field",
        "`param` names the field, the message what is allowed", NO),
    "missing_field": ErrorKind(400, INVALID, "a required field is not there", "send the field in `param`", NO),
    "unknown_field": ErrorKind(400, INVALID,
        "a field that nobody here knows; often a typing error", "leave it out", NO),
    "unsupported_value": ErrorKind(400, INVALID,
        "a known field asks for what this service, or its engine, cannot do", "leave the field out", NO),
    "invalid_header": ErrorKind(400, INVALID,
        "a header has an impossible value, or is not for clients", "correct it or leave it out", NO),
    "invalid_image": ErrorKind(400, INVALID,
        "not a complete JPEG, PNG, WebP or GIF of one frame; too large or too small; or its URL is not "
        "accepted or not answered", "send another image, as a `data:` URL", NO),
    "invalid_steering": ErrorKind(400, INVALID,
        "steering that was asked for is impossible: no image, no such preset",
        "change the field in `param`, or do not ask for it", NO),
    "context_length_exceeded": ErrorKind(400, INVALID,
        "prompt and `max_tokens` are more than the model's context",
        "shorten the conversation or ask for fewer tokens; the message has the numbers", NO),
    "invalid_api_key": ErrorKind(401, "authentication_error",
        "no key, an unknown one, or one that has expired", "send `Authorization: Bearer KEY`", NO),
    "permission_denied": ErrorKind(403, "permission_error",
        "the key lacks the scope that the path or the field needs", "use a key that has it", NO),
    "model_not_found": ErrorKind(404, INVALID, "no such model", "take a name from `GET /v1/models`", NO),
    "concept_not_found": ErrorKind(404, INVALID,
        "there is no such concept, it has no such picture, or the service has no artifact",
        "take an `id` or `thumbnail` from `GET /v1/concepts`", NO),
    "request_not_found": ErrorKind(404, INVALID,
        "feedback on an answer that this key was not given, or has judged, or more than an hour ago",
        "send the `id` of a recent completion, once", NO),
    "route_not_found": ErrorKind(404, INVALID, "no such path", "see `GET /openapi.json`", NO),
    "method_not_allowed": ErrorKind(405, INVALID, "the path has another method", "see the header `Allow`", NO),
    "body_timeout": ErrorKind(408, INVALID, "the body took too long to arrive", "send it without pauses", YES),
    "request_too_large": ErrorKind(413, INVALID,
        "the body, its texts, an image, or all images together are above a limit, or above what the key may "
        "send in a minute", "send less", NO),
    "unsupported_media_type": ErrorKind(415, INVALID,
        "the body is not said to be JSON", "send `Content-Type: application/json`", NO),
    "rate_limit_exceeded": ErrorKind(429, "rate_limit_error",
        "the key's requests, images or pixels of this minute are used up, or the address's requests",
        "wait as long as `Retry-After` says", LATER),
    "overloaded": ErrorKind(503, SERVER,
        "too many requests, connections or bytes at once", "wait; `Retry-After` is an estimate", LATER),
    "engine_unavailable": ErrorKind(503, SERVER,
        "the model loads, makes no progress, or was lost with this request",
        "wait; nothing of the request is kept", LATER),
    "shutting_down": ErrorKind(503, SERVER,
        "the service stops and takes no new requests", "wait for the next one to take its place", LATER),
    "request_timeout": ErrorKind(503, SERVER,
        "the answer took longer than a request may", "ask for fewer tokens or choices", NO),
    "bad_artifact": ErrorKind(503, SERVER, "the artifact does not belong to the model", "tell the operator", NO),
    "internal_error": ErrorKind(500, SERVER,
        "a fault of the service", "tell the operator the header `x-request-id`", YES),
}  # fmt: skip
"""Code to kind. The codes are also the labels of `vlsae_rejections_total`, so their number is bounded."""

PYDANTIC_CODES = {
    "json_invalid": "invalid_json",
    "missing": "missing_field",
    "extra_forbidden": "unknown_field",
    "unsupported": "unsupported_value",
    "unsupported_type": "unsupported_value",
    "unsupported_role": "unsupported_value",
}
"""pydantic's error types that are not simply an invalid value."""

DISCRIMINATORS = {"unsupported_type": "type", "unsupported_role": "role"}
"""Error type to the field it is about, where pydantic's path ends at the object around it."""

PYDANTIC_STEPS = frozenset(
    ("<system>", "<user>", "<assistant>", "<text>", "<parts>", "<image>", "<refusal>", "<object>", "<schema>", "[key]")
)
"""Steps that pydantic puts into error paths and no client ever wrote: branches of `schemas.py`'s unions, keys."""

EXPLAINED = tuple(
    f"{family}: "
    for family in ("steering.errors.BadArtifact", "steering.errors.EngineUnavailable", "service.settings.SettingsError")
)
"""How a traceback names the errors whose message says it all."""

RETRY_AFTER_S = 1.0
"""Where nothing better is known."""


AGAIN_IS_NO_USE = frozenset(("request_timeout", "bad_artifact"))
"""OpenAI's clients repeat any 503 by themselves unless a header tells them not to."""


class ApiError(Exception):
    """An answer to the client that is not a completion. `code` is a key of ERROR_KINDS."""

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry_after_s: float = RETRY_AFTER_S
    ) -> None:
        super().__init__(message)
        assert code in ERROR_KINDS, code
        self.code, self.message, self.param, self.retry_after_s = code, message, param, retry_after_s

    def __reduce__(self):
        return _rebuild, (self.code, self.message, self.param, self.retry_after_s)

    @property
    def status(self) -> int:
        return ERROR_KINDS[self.code].status

    def body(self) -> dict:
        """The JSON object OpenAI's clients parse."""
        kind = ERROR_KINDS[self.code]
        return {"error": {"message": self.message, "type": kind.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What a client needs besides the body: when to come back, how to say who it is."""
        if self.status in (429, 503):
            again = {"x-should-retry": "false"} if self.code in AGAIN_IS_NO_USE else {}
            return {"Retry-After": str(math.ceil(self.retry_after_s)), **again}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers={**(headers or {}), **self.headers()})


def _rebuild(code: str, message: str, param: str | None, retry_after_s: float) -> ApiError:
    """Unpickling passes positional arguments only; the model replica sends these to the ingress."""
    return ApiError(code, message, param=param, retry_after_s=retry_after_s)


def from_steering_error(error: SteeringError) -> ApiError:
    """The library's three families, as a client sees them."""
    if isinstance(error, InvalidSteering):
        ours = (error.field or "").startswith("steering")
        return ApiError("invalid_steering" if ours else "invalid_value", error.message, param=error.field)
    if isinstance(error, BadArtifact):
        return ApiError("bad_artifact", error.message, param=error.field)
    assert isinstance(error, EngineUnavailable), type(error)
    return ApiError("engine_unavailable", error.message, param=error.field)


def from_validation_error(error: ValidationError) -> ApiError:
    """The first thing pydantic found, with the path as a client would write it."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = first.get("ctx", {}).get("field") or DISCRIMINATORS.get(first["type"])
    param = field_path((*first["loc"], field) if field else first["loc"])
    code = PYDANTIC_CODES.get(first["type"], "invalid_value")
    message = first["msg"].removeprefix("Value error, ")
    if code == "unknown_field":
        message = "this field is not supported; leave it out"
    if code == "missing_field":
        message = "this field is required"
    return ApiError(code, f"{param}: {message}" if param else message, param=param)


def field_path(location: tuple[int | str, ...]) -> str | None:
    """('messages', 0, '<user>', 'content') -> 'messages[0].content'."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in PYDANTIC_STEPS:
            path += f".{step}" if path else step
    return path[:200] or None


def explained(messages: str) -> str | None:
    """What an operator needs of a replica's last words: our own message, where it was one of EXPLAINED."""
    last = max(EXPLAINED, key=messages.rfind)
    return messages.rpartition(last)[2].strip() if last in messages else None
