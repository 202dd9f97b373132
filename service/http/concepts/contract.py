"""What `/v1/concepts` and `/v1/compare` take and answer: types, for the OpenAPI document and for tests, and examples.

The answers' types build nothing at run time; a test holds real answers against them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessage
from pydantic import Discriminator, Field, RootModel, Tag

from service.chat.comparison import CompareRequest
from service.chat.schemas import ImageUrl
from service.chat.strict_model import Strict
from service.concepts.build import MAX_ID
from service.example import EXAMPLE_RECEIPT, example_answer, example_body
from service.http.answers import CACHE_CONTROL, ETAG, IF_NONE_MATCH_PARAMETER, STRENGTH_PARAMETER, Answer
from service.http.contract import Bodies
from steering.engines.base import Receipt

DEFAULT_PAGE, MAX_PAGE = 20, 100
MAX_QUERY = 256
"""Characters."""
DEFAULT_FOUND, MAX_IN_PICTURE = 10, 10
"""Concepts that a search finds; no more are known of a picture."""


class TextSearch(Strict):
    """Concepts with these words in label or texts."""

    text: str = Field(min_length=1, max_length=1000)
    """Any of its first 16 words will do."""
    limit: int = Field(default=DEFAULT_FOUND, ge=1, le=MAX_PAGE)


class ImageSearch(Strict):
    """Concepts that the model sees in a picture; also needs the scope `chat`."""

    image_url: ImageUrl
    limit: int = Field(default=DEFAULT_FOUND, ge=1, le=MAX_IN_PICTURE)


def _search_tag(body: Any) -> str:
    return "<image>" if isinstance(body, dict) and "image_url" in body else "<text>"


class SearchBody(
    RootModel[
        Annotated[
            Annotated[TextSearch, Tag("<text>")] | Annotated[ImageSearch, Tag("<image>")], Discriminator(_search_tag)
        ]
    ]
):
    """The body of `POST /v1/concepts/search`."""


class ConceptImage(Answer):
    reference: str | None
    """Which picture of the training data it is."""
    thumbnail: str | None
    """Path of its small picture on this service, if it has one."""


class ConceptAnswer(Answer):
    id: int
    object: Literal["concept"]
    label: str
    """Its most distinctive words; empty where it has none."""
    mean_activation: float | None
    """Over all training pairs."""
    texts: list[str]
    """Those that activate it most."""
    images: list[ConceptImage]


class FoundConcept(ConceptAnswer):
    score: float
    """Of a text: how well it fits; of a picture: the activation in it, 0 to 2."""


class ConceptPage(Answer):
    object: Literal["list"]
    data: list[ConceptAnswer]
    has_more: bool
    last_id: int | None
    """Null where there is none."""


class FoundConcepts(Answer):
    object: Literal["list"]
    data: list[FoundConcept]


class ComparedToken(Answer):
    text: str
    """Empty where its bytes only begin a character; the token that ends it has all of it."""
    differs: bool
    """Whether it is none of those that stand, in order, in the first answer, too."""


class ComparedAnswer(Answer):
    id: str
    """What feedback on this answer names."""
    steering: Receipt
    message: ChatCompletionMessage
    finish_reason: Literal["stop", "length"]
    usage: CompletionUsage
    tokens: list[ComparedToken]


class ComparisonAnswer(Answer):
    id: str
    object: Literal["comparison"]
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
    results: list[ComparedAnswer]
    """As the settings stand."""


EXAMPLE_CONCEPT = {
    "id": 17,
    "object": "concept",
    "label": "star, red",
    "mean_activation": 0.055,
    "texts": ["There is a star in red, a ring in yellow."],
    "images": [{"reference": "scene:1001450", "thumbnail": "/v1/concepts/17/thumbnails/0?v=5bd1e995"}],
}


def concept_bodies(model: str) -> dict[str, Bodies]:
    """By the route's path. `model` is the served one's name."""
    cached = {"headers": (ETAG, CACHE_CONTROL), "may_be_known": True}
    page = {"object": "list", "data": [EXAMPLE_CONCEPT], "has_more": True, "last_id": 17}
    found = {"object": "list", "data": [{**EXAMPLE_CONCEPT, "score": 1.41}]}
    picture = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
    one = (IF_NONE_MATCH_PARAMETER, _number("concept_id", "path", "The concept's id.", required=True, example=0))
    version = {**_text("v", 64), "description": "As `thumbnail` has it; then the answer may be kept for a year."}
    place = _number("image", "path", "Its place among the concept's images.", required=True, example=0)
    return {
        "/v1/compare": Bodies(
            ComparisonAnswer,
            {"example": _example_comparison(model)},
            CompareRequest,
            {"example": {**example_body(model), "settings": [{"strength": 0}, {"strength": 1}]}},
            parameters=(STRENGTH_PARAMETER,),
        ),
        "/v1/concepts": Bodies(
            ConceptPage,
            {"example": page},
            parameters=(
                IF_NONE_MATCH_PARAMETER,
                _number("limit", "query", f"Concepts of a page [{DEFAULT_PAGE}].", low=1, high=MAX_PAGE),
                _number("after", "query", "Only concepts with an id above this."),
                {**_text("q", MAX_QUERY), "description": "Only concepts with words that begin so, in label or texts."},
            ),
            **cached,
        ),
        "/v1/concepts/search": Bodies(FoundConcepts, {"example": found}, SearchBody, {"example": {"text": "red star"}}),
        "/v1/concepts/{concept_id:concept}": Bodies(
            ConceptAnswer, {"example": EXAMPLE_CONCEPT}, parameters=one, **cached
        ),
        "/v1/concepts/{concept_id:concept}/thumbnails/{image:concept}": Bodies(
            others={"image/jpeg": picture, "image/png": picture, "image/webp": picture},
            parameters=(*one, place, version),
            **cached,
        ),
    }


def _number(
    name: str, where: str, description: str, *, low: int = 0, high: int = MAX_ID, **more: Any
) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return {"name": name, "in": where, "description": description, "schema": schema, **more}


def _text(name: str, most: int) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": "string", "maxLength": most}}


def _example_comparison(model: str) -> dict[str, Any]:
    answer = example_answer(model)
    result = {
        "id": answer["id"],
        "steering": EXAMPLE_RECEIPT,
        "message": answer["choices"][0]["message"],
        "finish_reason": "stop",
        "usage": answer["usage"],
        "tokens": [{"text": " There", "differs": False}],
    }
    head = {key: answer[key] for key in ("created", "model", "system_fingerprint")}
    return {"id": "compare-137fbff1", "object": "comparison", **head, "results": [result, result]}
