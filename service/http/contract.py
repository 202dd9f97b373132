"""What every route takes and answers, with examples, as the OpenAPI document (`openapi.py`) has it. Serves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from openai.types import Model
from pydantic import BaseModel

from service.chat.schemas import ChatCompletionRequest
from service.chat.steering_sources import ALIASES
from service.example import EXAMPLE_RECEIPT, example_answer, example_body
from service.http.answers import (
    CACHE_CONTROL,
    ETAG,
    IF_NONE_MATCH_PARAMETER,
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
from service.http.feedback_route import FeedbackRequest
from service.http.middleware import ARM_HEADER, ASSIGNMENT_HEADER
from service.http.pages.playground import MEDIA_TYPES, Playground
from service.settings import Settings

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Bodies(NamedTuple):
    """Of one route."""

    gives: type[BaseModel] | None = None
    """The JSON of a 200."""
    shown: Mapping[str, Any] = NOTHING
    """Its `example`, or `examples`."""
    takes: type[BaseModel] | None = None
    asked: Mapping[str, Any] = NOTHING
    """As `shown`, of what it takes."""
    others: Mapping[str, Any] = NOTHING
    """Media type to the body of a 200 that is no JSON, or no JSON of ours."""
    links: dict[str, Any] | None = None
    parameters: tuple[dict[str, Any], ...] = ()
    headers: tuple[str, ...] = ()
    """Of a 200, beside those of every answer."""
    may_be_known: bool = False
    """Whether it answers 304 to whoever has the same already."""


def json_of(model: type[BaseModel] | None, shown: Mapping[str, Any]) -> dict[str, Any]:
    """By media type; nothing of no model."""
    return {JSON: {"schema": ref_to(model), **shown}} if model else {}


def ref_to(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def bodies_of(settings: Settings) -> dict[str, Bodies]:
    """By the route's path; those of concepts and comparisons have their own (`concepts/contract.py`)."""
    name = settings.model_name
    one_model = {"name": "model_id", "in": "path", "required": True, "schema": {"enum": model_names(settings)}}
    feedback = {"request_id": example_answer(name)["id"], "score": 1}
    return {
        "/v1/chat/completions": Bodies(
            SteeredCompletion,
            {"example": example_answer(name)},
            ChatCompletionRequest,
            {"examples": _chat_examples(name)},
            {EVENTS: {"schema": EVENT, "example": _stream(name)}},
            links=FEEDBACK_LINK,
            parameters=(STRENGTH_PARAMETER, UNIT_PARAMETER),
            headers=(ARM_HEADER, ASSIGNMENT_HEADER),
        ),
        "/v1/feedback": Bodies(FeedbackTaken, takes=FeedbackRequest, asked={"example": feedback}),
        "/v1/models": Bodies(ModelList),
        "/v1/models/{model_id:path}": Bodies(Model, parameters=(one_model,)),
        "/version": Bodies(Version),
        "/healthz": Bodies(Alive),
        "/readyz": Bodies(Ready),
        "/metrics": Bodies(others={TEXT: {"schema": {"type": "string"}}}),
        "/": Bodies(others=_files(".html"), parameters=(IF_NONE_MATCH_PARAMETER,), **PAGES),
        "/playground/{file:path}": Bodies(
            others=_files(".css", ".js", ".json", ".png", ".svg"),
            parameters=(PLAYGROUND_FILE, IF_NONE_MATCH_PARAMETER),
            **PAGES,
        ),
        "/openapi.json": Bodies(others={JSON: {"schema": {"type": "object"}}}),
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
                        "anyOf": [ref_to(SteeredChunk), ref_to(ErrorAnswer)],
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


def model_names(settings: Settings) -> list[str]:
    """As clients may write them."""
    return [settings.model_name + alias for alias in ALIASES]
