"""Every route, in one table: `api.py` serves it, `middleware.py` finds it and asks for its scope, `openapi.py`
describes it. What is not here is not reachable.
"""

from __future__ import annotations

from typing import NamedTuple

from service.callers import keys

WITH_BODY = (
    "invalid_json", "invalid_value", "missing_field", "unknown_field", "body_timeout", "request_too_large",
    "unsupported_media_type",
)  # fmt: skip
CHAT = (
    *WITH_BODY, "unsupported_value", "invalid_image", "invalid_steering", "context_length_exceeded",
    "model_not_found", "shutting_down", "bad_artifact",
)  # fmt: skip
CHAT_ANSWER = (
    "The completion; with `stream: true` server-sent events instead: chunks, then `[DONE]`. A stream that breaks ends "
    "with an error, and without `[DONE]`."
)


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
    Route("POST", "/v1/chat/completions", "chat", "chat.answer", "Ask about images and texts", CHAT_ANSWER, CHAT),
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
    Route("GET", "/", None, "playground", "The playground", "A page for people, of this service alone."),
    Route("GET", "/playground/{file:path}", None, "playground", "A part of the playground", "It.",
          ("route_not_found",)),
    Route("GET", "/openapi.json", None, "openapi", "This document", "OpenAPI 3.1."),
)  # fmt: skip
BY_PATH = {route.path: route for route in ROUTES}
