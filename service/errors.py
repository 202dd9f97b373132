"""Every error a client can see, in one table. Knows HTTP status codes and OpenAI's error shape; no routes."""

from __future__ import annotations

import math
from typing import NamedTuple

from pydantic import ValidationError
from starlette.responses import JSONResponse

from steering.errors import BadArtifact, EngineUnavailable, InvalidSteering, SteeringError


class ErrorKind(NamedTuple):
    """What an error code means to HTTP and to OpenAI's clients."""

    status: int
    type: str


ERROR_KINDS = {
    "invalid_json": ErrorKind(400, "invalid_request_error"),
    "invalid_value": ErrorKind(400, "invalid_request_error"),
    "missing_field": ErrorKind(400, "invalid_request_error"),
    "unknown_field": ErrorKind(400, "invalid_request_error"),
    "unsupported_value": ErrorKind(400, "invalid_request_error"),
    "invalid_header": ErrorKind(400, "invalid_request_error"),
    "invalid_image": ErrorKind(400, "invalid_request_error"),
    "invalid_steering": ErrorKind(400, "invalid_request_error"),
    "context_length_exceeded": ErrorKind(400, "invalid_request_error"),
    "invalid_api_key": ErrorKind(401, "authentication_error"),
    "permission_denied": ErrorKind(403, "permission_error"),
    "model_not_found": ErrorKind(404, "invalid_request_error"),
    "concept_not_found": ErrorKind(404, "invalid_request_error"),
    "request_not_found": ErrorKind(404, "invalid_request_error"),
    "route_not_found": ErrorKind(404, "invalid_request_error"),
    "method_not_allowed": ErrorKind(405, "invalid_request_error"),
    "body_timeout": ErrorKind(408, "invalid_request_error"),
    "request_too_large": ErrorKind(413, "invalid_request_error"),
    "unsupported_media_type": ErrorKind(415, "invalid_request_error"),
    "rate_limit_exceeded": ErrorKind(429, "rate_limit_error"),
    "overloaded": ErrorKind(503, "server_error"),
    "engine_unavailable": ErrorKind(503, "server_error"),
    "shutting_down": ErrorKind(503, "server_error"),
    "request_timeout": ErrorKind(503, "server_error"),
    "bad_artifact": ErrorKind(503, "server_error"),
    "internal_error": ErrorKind(500, "server_error"),
}
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
