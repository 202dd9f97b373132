"""The contract as an OpenAPI document: every route with its statuses, headers, errors and examples. Serves nothing.

Types come from `contract.py`, limits from the settings, errors from `errors.py`, routes from `routes.py`: nothing is
said twice.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from service import VERSION
from service.chat.request import MAX_TEXT_BYTES
from service.errors import ERROR_KINDS, ApiError
from service.http.answers import HEADERS, NOT_ALWAYS, REQUEST_ID_PARAMETER, ErrorAnswer, SteeredChunk
from service.http.concepts.contract import concept_bodies
from service.http.contract import JSON, Bodies, bodies_of, json_of, model_names, ref_to
from service.http.middleware import REQUEST_ID_HEADER
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
    bodies = bodies_of(settings) | concept_bodies(settings.model_name)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "VL-SAE steering",
            "version": VERSION,
            "description": "A vision-language model behind OpenAI's chat API. VL-SAE steering makes it invent less; "
            "`steering` in a request is the dial, `steering` in an answer the receipt.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(bodies, with_keys),
        "components": {
            "schemas": _schemas(settings, bodies),
            "headers": {name: {**header, "required": name not in NOT_ALWAYS} for name, header in HEADERS.items()},
            "parameters": {"RequestId": REQUEST_ID_PARAMETER},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": KEYS}},
        },
    }


KEYS = "An API key, where the service has keys; without keys every route is open."


def _paths(bodies: dict[str, Bodies], with_keys: bool) -> dict[str, Any]:
    paths: dict[str, Any] = {}
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
            "200": {
                "description": route.answer,
                "headers": _headers(200, given.headers),
                "content": {**json_of(given.gives, given.shown), **given.others},
            },
            **_error_responses(codes),
        },
    }
    if given.may_be_known:
        known = {"description": "The client has it already.", "headers": _headers(304, given.headers)}
        operation["responses"]["304"] = known
    if given.links is not None:
        operation["responses"]["200"]["links"] = given.links
    if given.takes is not None:
        operation["requestBody"] = {"required": True, "content": json_of(given.takes, given.asked)}
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


def _schemas(settings: Settings, bodies: dict[str, Bodies]) -> dict[str, Any]:
    """All types that bodies have, with the limits that this service's settings add."""
    models = dict.fromkeys(model for given in bodies.values() for model in (given.takes, given.gives) if model)
    mode: JsonSchemaMode = "validation"
    _, found = models_json_schema(
        [(model, mode) for model in (*models, SteeredChunk, ErrorAnswer)],
        ref_template="#/components/schemas/{model}",
        schema_generator=Schemas,
    )
    schemas = found["$defs"]
    for kind in ("ChatCompletionRequest", "CompareRequest"):
        chat = schemas[kind]["properties"]
        chat["model"]["enum"] = model_names(settings)
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
