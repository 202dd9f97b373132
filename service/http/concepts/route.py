"""`/v1/concepts`: what the artifact's concepts are, their pictures, and which of them a text or a picture is about.

Listed and searched in an index on disk (`concepts/index.py`); a picture is shown to the model
(`chat/picture_search.py`), and passes all that a picture in a chat passes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from typing import Any

from fastapi import Request, Response

from service.callers.keys import require
from service.chat.picture_search import concepts_in
from service.concepts.build import MAX_ID
from service.concepts.index import ConceptIndex, Found
from service.errors import ApiError
from service.http.concepts.contract import DEFAULT_PAGE, MAX_PAGE, MAX_QUERY, SearchBody, TextSearch
from service.http.model_answer import Admitted, ModelAnswer, ModelRequests
from service.http.pages.tagged import ASK_AGAIN, FOR_A_YEAR, tagged
from steering.concepts import Concept

DIGITS = re.compile(f"[0-9]{{1,{len(str(MAX_ID))}}}")
VERSION_DIGITS = 16


class ConceptsRoute:
    """The routes below `/v1/concepts`."""

    def __init__(self, shared: ModelRequests, index: ConceptIndex | None) -> None:
        """Without an artifact there is no index, and every route a 404."""
        self._shared, self._index = shared, index

    async def page(self, request: Request) -> Response:
        """Raises ApiError."""
        index, query = self._there(), Query(request, "limit", "after", "q")
        limit, after = query.number("limit", DEFAULT_PAGE, low=1, high=MAX_PAGE), query.number("after", -1)
        found, more = await asyncio.to_thread(index.page, after=after, limit=limit, words=query.text("q", MAX_QUERY))
        page = {
            "object": "list",
            "data": [shown(concept) for concept in found],
            "has_more": more,
            "last_id": found[-1]["id"] if found else None,
        }
        return tagged(request, as_json(page), "application/json")

    async def one(self, request: Request) -> Response:
        """Raises ApiError."""
        concept = await self._concept(request.path_params["concept_id"])
        return tagged(request, as_json(shown(concept)), "application/json")

    async def thumbnail(self, request: Request) -> Response:
        """Raises ApiError."""
        concept_id, place = request.path_params["concept_id"], request.path_params["image"]
        version = Query(request, "v").text("v", MAX_QUERY)
        concept = await self._concept(concept_id)
        found = await asyncio.to_thread(self._there().thumbnail, concept_id, place)
        if found is None:
            raise ApiError("concept_not_found", f"concept {concept_id} has no thumbnail {place}")
        known = version == version_of(concept["images"][place]["thumbnail"])
        answer = tagged(request, found.content, found.media_type, keep=FOR_A_YEAR if known else ASK_AGAIN)
        answer.headers["x-content-type-options"] = "nosniff"
        return answer

    async def search(self, request: Request) -> Response:
        """Raises ApiError."""
        self._there()
        return ModelAnswer(self._shared, request, self._search)

    async def _search(self, asked: Admitted) -> None:
        found = [{**shown(concept), "score": score} for concept, score in await self._found(asked)]
        await asked.reply.whole(as_json({"object": "list", "data": found}))

    async def _found(self, asked: Admitted) -> list[Found]:
        index = self._there()
        async with asked.body(SearchBody) as body:
            given = body.root
            if isinstance(given, TextSearch):
                return await asyncio.to_thread(index.search, given.text, limit=given.limit)
            require(asked.context.caller, "chat")
            active = await concepts_in(self._shared.runner, given.image_url.url, asked.context, field="image_url.url")
        return [Found(await self._named(one.id), one.image) for one in active[: given.limit]]

    async def _named(self, concept_id: int) -> Concept:
        """One of which nothing is said has an id all the same."""
        return await asyncio.to_thread(self._there().one, concept_id) or {"id": concept_id}

    async def _concept(self, concept_id: int) -> Concept:
        concept = await asyncio.to_thread(self._there().one, concept_id)
        if concept is None:
            raise ApiError("concept_not_found", f"nothing is said of a concept {concept_id}; see GET /v1/concepts")
        return concept

    def _there(self) -> ConceptIndex:
        if self._index is None:
            raise ApiError("concept_not_found", "this service has no artifact, and so no concepts")
        return self._index


class Query:
    """A query string, strictly."""

    def __init__(self, request: Request, *names: str) -> None:
        """Raises ApiError for other names, and for one that stands there twice."""
        self._given = dict(request.query_params)
        for name in self._given:
            if name not in names:
                message = f"{name[:64]}: this parameter is not known; there are {', '.join(names)}"
                raise ApiError("unknown_field", message, param=name[:64])
        if len(request.query_params.multi_items()) > len(self._given):
            raise ApiError("invalid_value", f"{', '.join(self._given)}: send each parameter once")

    def number(self, name: str, default: int, *, low: int = 0, high: int = MAX_ID) -> int:
        """Raises ApiError."""
        given = self._given.get(name)
        if given is None:
            return default
        if not DIGITS.fullmatch(given) or not low <= int(given) <= high:
            raise ApiError("invalid_value", f"{name}: must be a whole number from {low} to {high}", param=name)
        return int(given)

    def text(self, name: str, most: int) -> str:
        """Raises ApiError."""
        given = self._given.get(name, "")
        if len(given) > most:
            raise ApiError("invalid_value", f"{name}: at most {most} characters are allowed", param=name)
        return given


def shown(concept: Concept) -> dict[str, Any]:
    """A concept as a client sees it: its thumbnails are paths of their own."""
    concept_id = concept["id"]
    return {
        "id": concept_id,
        "object": "concept",
        "label": concept.get("label", ""),
        "mean_activation": concept.get("mean_activation"),
        "texts": concept.get("texts", []),
        "images": [
            {"reference": image.get("reference"), "thumbnail": path_of(concept_id, place, image["thumbnail"])}
            for place, image in enumerate(concept.get("images", []))
        ],
    }


def path_of(concept_id: int, place: int, thumbnail: str | None) -> str | None:
    """Changes with the picture, so that it may be kept."""
    if thumbnail is None:
        return None
    return f"/v1/concepts/{concept_id}/thumbnails/{place}?v={version_of(thumbnail)}"


def version_of(thumbnail: str) -> str:
    return hashlib.sha256(thumbnail.encode()).hexdigest()[:VERSION_DIGITS]


def as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
