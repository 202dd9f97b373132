"""What a route takes and gives, as the OpenAPI document says it. Knows no routes."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"


class Bodies(NamedTuple):
    """Of one route."""

    content: dict[str, Any]
    """Media type to the body of a 200."""
    body: dict[str, Any] | None = None
    links: dict[str, Any] | None = None
    parameters: tuple[dict[str, Any], ...] = ()
    headers: tuple[str, ...] = ()
    """Of a 200, beside those of every answer."""
    may_be_known: bool = False
    """Whether it answers 304 to whoever has the same already."""


def ref_to(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def json_of(model: type[BaseModel], **more: Any) -> dict[str, Any]:
    return {JSON: {"schema": ref_to(model), **more}}
