"""How strictly a request's fields are read, and what is said where one will not do. Knows none of the fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


def inconsistent(field: str, reason: str) -> PydanticCustomError:
    """Two fields that do not go together; `field` is the one to change."""
    return PydanticCustomError("inconsistent", "{reason}", {"field": field, "reason": reason})


def uncallable(field: str, choice: str, instead: str) -> PydanticCustomError:
    """Tools that the model would be free to call; `instead`: what else there is."""
    reason = 'this model calls none; send {choice}: "none", or leave {field} out; {instead}'
    return PydanticCustomError("unsupported", reason, {"field": field, "choice": choice, "instead": instead})


def by(field: str, tags: Mapping[str, str], supported: str) -> Discriminator:
    """Which branch of a union an object belongs to: that with the tag of what stands in the field. `supported` is said
    where it is no such thing."""

    def tag(given: Any) -> str | None:
        kind = given.get(field) if isinstance(given, dict) else getattr(given, field, None)
        return tags.get(kind) if isinstance(kind, str) else None

    return Discriminator(
        tag,
        custom_error_type=f"unsupported_{field}",
        custom_error_message=f"must be {supported}",
    )


class Neutral:
    """Annotates a known OpenAI field that may only ask for nothing; any other value is an error, never ignored."""

    def __init__(self, *values: object, instead: str = "") -> None:
        self.values, self._instead = values, f"; {instead}" if instead else ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [None, *self.values]}

    def _check(self, value: object) -> object:
        if value is None or any(type(value) is type(neutral) and value == neutral for neutral in self.values):
            return value
        allowed = ", ".join(["null", *(json.dumps(neutral) for neutral in self.values)])
        reason = "only these values are supported: {allowed}{instead}"
        raise PydanticCustomError("unsupported", reason, {"allowed": allowed, "instead": self._instead})


class Strict(BaseModel):
    """No coercion, no unknown field, no NaN."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )
