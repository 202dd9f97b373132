"""Every route, in one table: `api.py` serves it, `middleware.py` finds it and asks for its scope, `openapi.py`
describes it. What is not here is not reachable.
"""

from __future__ import annotations

from typing import NamedTuple

from starlette.convertors import Convertor, register_url_convertor

from service.callers import keys
from service.concepts.build import MAX_ID

WITH_BODY = (
    "invalid_json", "invalid_value", "missing_field", "unknown_field", "body_timeout", "request_too_large",
    "unsupported_media_type",
)  # fmt: skip
CHAT = (
    *WITH_BODY, "unsupported_value", "invalid_image", "invalid_steering", "context_length_exceeded",
    "model_not_found", "shutting_down", "bad_artifact",
)  # fmt: skip
CONCEPTS = ("concept_not_found", "bad_artifact")
CHAT_ANSWER = (
    "The completion; with `stream: true` server-sent events instead: chunks, then `[DONE]`. A stream that breaks ends "
    "with an error, and without `[DONE]`."
)


class ConceptNumber(Convertor[int]):
    """A path's id of a concept, or place of an image: digits, no more than MAX_ID has."""

    regex = f"[0-9]{{1,{len(str(MAX_ID))}}}"

    def convert(self, value: str) -> int:
        return int(value)

    def to_string(self, value: int) -> str:
        return str(value)


register_url_convertor("concept", ConceptNumber())


class Route(NamedTuple):
    """One operation."""

    method: str
    path: str
    """As the router has it."""
    scope: keys.Scope | None
    """What a key needs; None: public."""
    handler: str
    """Method of `api.Handlers`, or of a part of it."""
    summary: str
    answer: str
    """What a 200 is."""
    errors: tuple[str, ...] = ()
    """Codes beside those of every route, and beside those of every route that needs a key."""


ROUTES = (
    Route("POST", "/v1/chat/completions", "chat", "chat", "Ask about images and texts", CHAT_ANSWER, CHAT),
    Route("POST", "/v1/compare", "chat", "compare", "Ask at several settings of steering",
          "The answers, and by token where they differ.", CHAT),
    Route("GET", "/v1/concepts", "explain", "concepts.page", "The artifact's concepts",
          "A page of them; the next one is `after` the `last_id`.", (*CONCEPTS, "invalid_value", "unknown_field")),
    Route("POST", "/v1/concepts/search", "explain", "concepts.search", "Which concepts a text or a picture is about",
          "The best first.", (*CONCEPTS, *WITH_BODY, "invalid_image", "invalid_steering", "context_length_exceeded",
                              "shutting_down")),
    Route("GET", "/v1/concepts/{concept_id:concept}", "explain", "concepts.one", "One of them", "It is there.",
          (*CONCEPTS, "route_not_found")),
    Route("GET", "/v1/concepts/{concept_id:concept}/thumbnails/{image:concept}", "explain", "concepts.thumbnail",
          "A small picture of what a concept shows", "The picture.",
          (*CONCEPTS, "route_not_found", "invalid_value", "unknown_field")),
    Route("POST", "/v1/feedback", "chat", "feedback", "Say how good an answer was", "Counted.",
          (*WITH_BODY, "request_not_found")),
    Route("GET", "/v1/models", "chat", "models", "Which models there are", "All of them."),
    Route("GET", "/v1/models/{model_id:path}", "chat", "one_model", "One of them", "It is there.",
          ("model_not_found", "route_not_found")),  # the latter where the id has a line break: no path of ours has
    Route("GET", "/version", "chat", "version", "What is served", "Versions, and what the engine can do."),
    Route("GET", "/healthz", None, "alive", "Is the process alive?", "It is."),
    Route("GET", "/readyz", None, "ready", "Will a request be answered?", "The model makes progress.",
          ("shutting_down",)),
    Route("GET", "/metrics", "metrics", "metrics", "Metrics for Prometheus", "Text exposition format 0.0.4."),
    Route("GET", "/", None, "pages.page", "The playground", "A page for people, of this service alone."),
    Route("GET", "/playground/{file:path}", None, "pages.file", "A part of the playground", "It.",
          ("route_not_found",)),
    Route("GET", "/openapi.json", None, "openapi", "This document", "OpenAPI 3.1."),
)  # fmt: skip
BY_PATH = {route.path: route for route in ROUTES}
