"""A client's JSON schema: checked and bounded before an engine makes a grammar of it. Knows no HTTP and no engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for

from service.chat.plain_schema import plain_schema

MAX_SCHEMA_BYTES = 64 * 1024
MAX_DEPTH = 32
"""Objects and arrays inside each other; one level of a client's own objects takes two."""
MAX_PARTS = 1000
"""Objects, arrays and booleans: whatever may be a schema of its own. Checking takes up to 0.3 ms for each."""
MAX_SHOWN = 300


def canonical_json_schema(schema: Any) -> str:
    """The schema as compact JSON text, plainly put. Keys keep their order: an answer's members come in it.

    Raises ValueError that says what is wrong.
    """
    if not isinstance(schema, dict):
        raise ValueError("must be an object")
    _checked_text(schema)
    try:
        dialect = validator_for(schema) if isinstance(schema.get("$schema", ""), str) else Draft202012Validator
        dialect.check_schema(schema)
    except SchemaError as error:
        where = "/".join(str(step) for step in error.absolute_path)
        raise ValueError(f"not a JSON schema: at '/{where}': {error.message}"[:MAX_SHOWN]) from None
    except (OverflowError, RecursionError):
        raise ValueError("a pattern in it is too large") from None
    return _checked_text(plain_schema(schema))


def _checked_text(schema: dict) -> str:
    for count, (value, depth) in enumerate(_parts(schema), start=1):
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if count > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} objects, arrays and booleans")
        reference = value.get("$ref") if isinstance(value, dict) else None
        if isinstance(reference, str) and not _points_into(schema, reference):
            raise ValueError(f"$ref {reference[:100]!r} does not point to a part of the schema ('#/$defs/...')")
    text = json.dumps(schema, separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_SCHEMA_BYTES:
        raise ValueError(f"larger than {MAX_SCHEMA_BYTES} bytes")
    return text


def _parts(schema: dict) -> Iterator[tuple[Any, int]]:
    """Every object, array and boolean with its depth, the outermost first."""
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            pending += [(one, depth + 1) for one in inner]
        if isinstance(value, dict | list | bool):
            yield value, depth


def _points_into(schema: dict, reference: str) -> bool:
    """Whether '#', '#/$defs/name' and so on (RFC 6901) leads to something."""
    root, *steps = reference.split("/")
    place: Any = schema
    for step in steps:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
            place = place[int(name)]
        elif isinstance(place, dict) and name in place:
            place = place[name]
        else:
            return False
    return root == "#"
