"""The contract as an OpenAPI document: every route with its statuses, headers, errors and examples. Serves nothing.

Types come from `schemas.py`, `answers.py` and the openai package, limits from the settings, errors from `errors.py`,
routes from `routes.py`: nothing is said twice.
"""

from __future__ import annotations

import re
from typing import Any

from openai.types import Model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from service import VERSION
from service.chat.request import MAX_TEXT_BYTES
from service.chat.schemas import ChatCompletionRequest
from service.chat.steering_sources import ALIASES
from service.errors import ERROR_KINDS, ApiError
from service.example import EXAMPLE_RECEIPT, example_answer, example_body
from service.http.answers import (
    CACHE_CONTROL,
    ETAG,
    HEADERS,
    IF_NONE_MATCH_PARAMETER,
    NOT_ALWAYS,
    REQUEST_ID_PARAMETER,
    STRENGTH_PARAMETER,
    UNIT_PARAMETER,
    Alive,
    ErrorAnswer,
    FeedbackTaken,
    ModelList,
    Ready,
    SteeredChunk,
    SteeredCompletion,
    Version,
)
from service.http.bodies import EVENTS, JSON, TEXT, Bodies, json_of, ref_to
from service.http.concepts.contract import ANSWERS, REQUESTS, concept_bodies
from service.http.feedback_route import FeedbackRequest
from service.http.middleware import ARM_HEADER, ASSIGNMENT_HEADER, REQUEST_ID_HEADER
from service.http.pages.playground import MEDIA_TYPES, Playground
from service.http.routes import ROUTES, Route
from service.settings import Settings

EVERYWHERE = ("invalid_header", "internal_error", "engine_unavailable", "overloaded", "request_timeout")
"""Errors that any route may answer with: the guard's, and those of the proxy before it."""
WITH_KEY = ("invalid_api_key", "permission_denied", "rate_limit_exceeded")
STATUS_HEADERS = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After", "x-should-retry")}


class Schemas(GenerateJsonSchema):
    """Without a title for every field and without defaults that only say 'not given'."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


def build_openapi(settings: Settings, *, with_keys: bool) -> dict[str, Any]:
    """The document of a service with these settings, that asks for keys or does not."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "VL-SAE steering",
            "version": VERSION,
            "description": "A vision-language model behind OpenAI's chat API. VL-SAE steering makes it invent less; "
            "`steering` in a request is the dial, `steering` in an answer the receipt.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(settings, with_keys),
        "components": {
            "schemas": _schemas(settings),
            "headers": {name: {**header, "required": name not in NOT_ALWAYS} for name, header in HEADERS.items()},
            "parameters": {"RequestId": REQUEST_ID_PARAMETER},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": KEYS}},
        },
    }


KEYS = "An API key, where the service has keys; without keys every route is open."


def _paths(settings: Settings, with_keys: bool) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    bodies = _bodies(settings)
    for route in ROUTES:
        operation = _operation(route, bodies[route.path], route.scope if with_keys else None)
        paths.setdefault(written(route.path), {})[route.method.lower()] = operation
    return paths


def written(path: str) -> str:
    """A route's path as the document has it: without what the router takes its parameters for."""
    return re.sub(r":\w+}", "}", path)


def _operation(route: Route, given: Bodies, scope: str | None) -> dict[str, Any]:
    """`scope` is what a key needs; None: no key is asked for."""
    codes = {*EVERYWHERE, *route.errors, *(WITH_KEY if scope else ())}
    operation: dict[str, Any] = {
        "operationId": route.method.lower() + written(route.path).title().translate(str.maketrans("", "", "/._{}")),
        "summary": route.summary,
        "description": f"Needs a key with the scope `{scope}`." if scope else "Needs no key.",
        "security": [{"key": [scope]}] if scope else [],
        "parameters": [{"$ref": "#/components/parameters/RequestId"}, *given.parameters],
        "responses": {
            "200": {"description": route.answer, "headers": _headers(200, given.headers), "content": given.content},
            **_error_responses(codes),
        },
    }
    if given.may_be_known:
        known = {"description": "The client has it already.", "headers": _headers(304, given.headers)}
        operation["responses"]["304"] = known
    if given.links is not None:
        operation["responses"]["200"]["links"] = given.links
    if given.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: given.body}}
    return operation


def _error_responses(codes: set[str]) -> dict[str, Any]:
    """By status; each code with what it means and an example."""
    responses = {}
    for status in sorted({ERROR_KINDS[code].status for code in codes}):
        here = {code: kind for code, kind in ERROR_KINDS.items() if code in codes and kind.status == status}
        examples = {
            code: {"summary": kind.when, "value": ApiError(code, f"{kind.when}: {kind.remedy}").body()}
            for code, kind in here.items()
        }
        responses[str(status)] = {
            "description": "\n".join(f"- `{code}`: {kind.when}; {kind.remedy}" for code, kind in here.items()),
            "headers": _headers(status),
            "content": {JSON: {"schema": _error_schema(list(here)), "examples": examples}},
        }
    return responses


def _error_schema(codes: list[str]) -> dict[str, Any]:
    """An error with one of these codes."""
    code = {"type": "object", "properties": {"error": {"properties": {"code": {"enum": codes}}}}}
    return {"allOf": [ref_to(ErrorAnswer), code]}


def _headers(status: int, more: tuple[str, ...] = ()) -> dict[str, Any]:
    names = (REQUEST_ID_HEADER, *STATUS_HEADERS.get(status, ()), *more)
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _bodies(settings: Settings) -> dict[str, Bodies]:
    """By the route's path."""
    name = settings.model_name
    one_model = {"name": "model_id", "in": "path", "required": True, "schema": {"enum": _model_names(settings)}}
    feedback = {"request_id": example_answer(name)["id"], "score": 1}
    return {
        "/v1/chat/completions": Bodies(
            _chat_content(name),
            body={"schema": ref_to(ChatCompletionRequest), "examples": _chat_examples(name)},
            links=FEEDBACK_LINK,
            parameters=(STRENGTH_PARAMETER, UNIT_PARAMETER),
            headers=(ARM_HEADER, ASSIGNMENT_HEADER),
        ),
        **concept_bodies(name),
        "/v1/feedback": Bodies(json_of(FeedbackTaken), body={"schema": ref_to(FeedbackRequest), "example": feedback}),
        "/v1/models": Bodies(json_of(ModelList)),
        "/v1/models/{model_id:path}": Bodies(json_of(Model), parameters=(one_model,)),
        "/version": Bodies(json_of(Version)),
        "/healthz": Bodies(json_of(Alive)),
        "/readyz": Bodies(json_of(Ready)),
        "/metrics": Bodies({TEXT: {"schema": {"type": "string"}}}),
        "/": Bodies(_files(".html"), parameters=(IF_NONE_MATCH_PARAMETER,), **PAGES),
        "/playground/{file:path}": Bodies(
            _files(".css", ".js", ".json", ".png", ".svg"),
            parameters=(PLAYGROUND_FILE, IF_NONE_MATCH_PARAMETER),
            **PAGES,
        ),
        "/openapi.json": Bodies({JSON: {"schema": {"type": "object"}}}),
    }


PAGES: dict[str, Any] = {"headers": (ETAG, CACHE_CONTROL), "may_be_known": True}
PLAYGROUND_FILE = {"name": "file", "in": "path", "required": True, "schema": {"enum": Playground().names}}


def _files(*endings: str) -> dict[str, Any]:
    """What a route of files gives: its own to read, no contract."""
    kinds = [MEDIA_TYPES[ending].partition(";")[0] for ending in endings]
    return {kind: {"schema": {} if kind == JSON else {"type": "string"}} for kind in kinds}


EVENT = {
    "type": "object",
    "description": "One server-sent event.",
    "properties": {
        "data": {
            "type": "string",
            "anyOf": [
                {"const": "[DONE]"},
                {
                    "contentMediaType": JSON,
                    "contentSchema": {
                        "anyOf": [
                            {"$ref": "#/components/schemas/SteeredChunk"},
                            {"$ref": "#/components/schemas/ErrorAnswer"},
                        ]
                    },
                },
            ],
        }
    },
    "required": ["data"],
}
FEEDBACK_LINK = {
    "feedback": {
        "operationId": "postV1Feedback",
        "description": "The answer's `id` is what feedback on it names.",
        "requestBody": {"request_id": "$response.body#/id", "score": 1},
    }
}


def _chat_content(name: str) -> dict[str, Any]:
    whole = json_of(SteeredCompletion, example=example_answer(name))
    return {**whole, EVENTS: {"schema": EVENT, "example": _stream(name)}}


def _stream(name: str) -> str:
    """The example's answer as it is streamed, its middle left out."""
    answer = example_answer(name)
    head = {key: answer[key] for key in ("id", "created", "model", "system_fingerprint")}

    def event(delta: dict[str, Any], finish: Any = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = {**head, "object": "chat.completion.chunk", "choices": [choice], **more}
        return f"data: {SteeredChunk.model_validate(chunk).model_dump_json(exclude_unset=True)}\n\n"

    last = event({}, "stop", steering=EXAMPLE_RECEIPT)
    return event({"role": "assistant", "content": ""}) + event({"content": " There"}) + last + "data: [DONE]\n\n"


def _chat_examples(name: str) -> dict[str, Any]:
    body = example_body(name)
    return {
        "picture": {"summary": "A question about a picture", "value": body},
        "half": {"summary": "Half as strong", "value": {**body, "steering": {"strength": 0.5}}},
        "plain": {"summary": "The plain model", "value": {**body, "model": f"{name}:off"}},
        "stream": {
            "summary": "As it is written, with usage",
            "value": {**body, "stream": True, "stream_options": {"include_usage": True}},
        },
    }


def _model_names(settings: Settings) -> list[str]:
    return [settings.model_name + alias for alias in ALIASES]


def _schemas(settings: Settings) -> dict[str, Any]:
    """All types, with the limits that this service's settings add."""
    models = (
        ChatCompletionRequest, FeedbackRequest, SteeredCompletion, SteeredChunk, FeedbackTaken, Model, ModelList, Alive,
        Ready, Version, ErrorAnswer, *REQUESTS, *ANSWERS,
    )  # fmt: skip
    mode: JsonSchemaMode = "validation"
    _, found = models_json_schema(
        [(model, mode) for model in models],
        ref_template="#/components/schemas/{model}",
        schema_generator=Schemas,
    )
    schemas = found["$defs"]
    for kind in ("ChatCompletionRequest", "CompareRequest"):
        chat = schemas[kind]["properties"]
        chat["model"]["enum"] = _model_names(settings)
        for field in ("max_tokens", "max_completion_tokens"):
            chat[field]["anyOf"][0]["maximum"] = settings.max_tokens_limit
        chat["messages"]["description"] = f"Their texts have at most {MAX_TEXT_BYTES} bytes of UTF-8 together."
    schemas["ChatCompletionRequest"]["properties"]["n"]["anyOf"][0]["maximum"] = settings.max_choices
    several = schemas["CompareRequest"]["properties"]["settings"]
    several["maxItems"] = min(several["maxItems"], settings.max_choices)
    url = schemas["ImageUrl"]["properties"]["url"]
    url["format"] = "image-url"
    url["description"] = _image_description(settings)
    steering = schemas["SteeringRequest"]["properties"]
    if settings.loaded_artifact is None:
        steering["concepts"], steering["explain"] = {"enum": [None, {}]}, {"enum": [None, False]}
    if not settings.allow_controls:
        steering["control"] = {"enum": [None, "none"]}
    return schemas


def _image_description(settings: Settings) -> str:
    hosts = ", ".join(host for host in settings.image_hosts.split(",") if host)
    return (
        "`data:image/png;base64,...` (or jpeg, webp, gif)"
        + (f", or an https URL of one of {hosts}" if hosts else "")
        + f". At most {settings.max_images} images, each at most {settings.max_image_bytes} bytes and "
        f"{settings.max_image_pixels} pixels, together at most {settings.max_request_pixels} pixels."
    )
