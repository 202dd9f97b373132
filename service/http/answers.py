"""What the routes answer, for the OpenAPI document and for tests: OpenAI's types with our receipt, and our own; and the
headers that are this service's.

Nothing is built from these at run time; a test holds real answers against them.
"""

from __future__ import annotations

from typing import Any, Literal

from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ConfigDict

from service.chat.request import STRENGTH_HEADER
from service.http.chat_route import UNIT, UNIT_HEADER
from service.http.middleware import ARM_HEADER, ASSIGNMENT_HEADER, REQUEST_ID, REQUEST_ID_HEADER
from steering.engines.base import Receipt


class SteeredCompletion(ChatCompletion):
    """OpenAI's chat completion, with the receipt: what steering did to it."""

    steering: Receipt


class SteeredChunk(ChatCompletionChunk):
    """One event of a stream, after `data: `. The receipt is on the usage chunk if there is one, else on the last."""

    steering: Receipt | None = None


class Answer(BaseModel):
    """Has the fields named and no other."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]
    """The model, and the model always plain (`:off`) or always steered (`:steered`)."""


class FeedbackTaken(Answer):
    object: Literal["feedback"]
    request_id: str
    score: float


class Alive(Answer):
    status: Literal["alive"]


class Ready(Answer):
    status: Literal["ready"]
    running: int = 0
    """Sequences in the model's batch; not there where the model is too busy to say."""
    waiting: int = 0
    """Sequences that wait for a place in it."""


class Live(Answer):
    """Settings that were changed while the service runs."""

    changed: dict[str, Any]
    """Those that are in force now."""
    since: int
    """Seconds since 1970."""
    refused: str | None
    """Why the last change is not in force, if it is not."""


class Beside(Answer):
    """An artifact that is loaded beside the service's own, or is to be."""

    artifact: str | None = None
    """Its fingerprint."""
    system_fingerprint: str | None = None
    presets: list[str] | None = None
    refused: str | None = None
    """Why it cannot answer, if it cannot."""


class Version(Answer):
    version: str
    """Of this service."""
    model: str
    model_family: str
    engine: str
    context_tokens: int
    """Most tokens of prompt and answer together."""
    system_fingerprint: str
    """Changes with whatever can change an answer."""
    default_artifact: str
    """Name of the one that answers where no arm says otherwise: `main`, or a candidate."""
    artifact: str | None
    """Its fingerprint, where one is loaded."""
    candidates: dict[str, Beside]
    """Those that an arm, or `default_artifact`, may name."""
    presets: list[str]
    alignment: dict[str, float] | None
    """How far image and text agree in pairs that the artifact was not trained on."""
    faithfulness: dict[str, float] | None
    """What its autoencoders lose while text is generated; empty where that was not measured."""
    live_settings: Live


class ErrorDetail(Answer):
    message: str
    """What is wrong and what to do, for people."""
    type: str
    """OpenAI's family of errors."""
    param: str | None
    """The field or header at fault, as in `messages[0].content`."""
    code: str
    """For programs."""


class ErrorAnswer(Answer):
    """Every error, also as the last event of a stream that breaks."""

    error: ErrorDetail


REQUEST_ID_PARAMETER = {
    "name": REQUEST_ID_HEADER,
    "in": "header",
    "description": "Names the request in the service's log; one is made where none is given.",
    "schema": {"type": "string", "pattern": f"^{REQUEST_ID.pattern}$"},
}
HEADERS: dict[str, dict[str, Any]] = {
    REQUEST_ID_HEADER: {"description": "The request's id, taken or made.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"description": "How to present a key.", "schema": {"type": "string"}},
    "ETag": {"description": "Names this content, for `If-None-Match`.", "schema": {"type": "string"}},
    ARM_HEADER: {
        "description": "While an experiment runs: the arm whose steering this is, `own` for the caller's.",
        "schema": {"type": "string"},
    },
    ASSIGNMENT_HEADER: {
        "description": "Why: `unit` by the hash of who asked, `no_unit` the default arm, since nobody was named.",
        "schema": {"enum": ["unit", "no_unit", "not_covered", "own"]},
    },
    "x-should-retry": {
        "description": "There where sending the request again is no use; OpenAI's clients obey it.",
        "schema": {"const": "false"},
    },
}
NOT_ALWAYS = ("x-should-retry", ARM_HEADER, ASSIGNMENT_HEADER)
UNIT_PARAMETER = {
    "name": UNIT_HEADER,
    "in": "header",
    "description": "Who asks, for an experiment: the same unit gets the same arm. Else `user` of the body is the unit.",
    "schema": {"type": "string", "pattern": f"^{UNIT.pattern}$"},
    "example": "visitor-17",
}
KNOWN_PARAMETER = {
    "name": "If-None-Match",
    "in": "header",
    "description": "The `ETag` of a copy that one has: if it is still good, the answer is a 304 without a body.",
    "schema": {"type": "string"},
}
STRENGTH_PARAMETER = {
    "name": STRENGTH_HEADER,
    "in": "header",
    "description": "The dial, where the body does not say: 0 is the plain model, 1 the preset.",
    "schema": {"type": "string", "pattern": r"^(0{1,3}(\.[0-9]{1,9})?|0{0,2}1(\.0{1,9})?|\.[0-9]{1,9})$"},
    "example": "0.5",
}
