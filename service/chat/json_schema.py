"""A client's JSON schema: checked, bounded, and put in plainer words that mean the same, before an engine makes a
grammar of it. Knows no HTTP and no engine.

Clients write tuples as draft 7 has them, name an object's members by an enum, require members that they do not
describe, and say a string's `pattern` beside its `format`; of each, a grammar would enforce one half or none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for

MAX_SCHEMA_BYTES = 64 * 1024
MAX_DEPTH = 32
"""Objects and arrays inside each other; one level of a client's own objects takes two."""
MAX_PARTS = 1000
"""Objects, arrays and booleans: whatever may be a schema of its own. Checking takes up to 0.3 ms for each."""
MAX_SHOWN = 300
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
SCHEMAS = (
    "items", "additionalItems", "unevaluatedItems", "contains", "additionalProperties", "unevaluatedProperties",
    "propertyNames", "not", "if", "then", "else",
)  # fmt: skip
BESIDE_NAMES = ("properties", "patternProperties", "unevaluatedProperties")
MEMBERS_ELSEWHERE = ("patternProperties", "unevaluatedProperties", "propertyNames", "$ref", *SCHEMA_LISTS[:3])
"""Beside these, what `properties` lacks may be said in another place."""
MAX_REPEATED = 64 * 1024
"""Characters of one schema, times the names that it is given to."""


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


def plain_schema(schema: Any) -> Any:
    """The same schema, a valid one, for draft 2020-12; its members keep their order. Raises ValueError where an object
    requires what it forbids, or gives a large schema to many names.
    """
    if not isinstance(schema, dict):
        return schema
    part = {word: _inner(word, value) for word, value in schema.items()}
    return _without_format(_with_required_members(_with_named_members(_with_prefix_items(part))))


def _inner(word: str, value: Any) -> Any:
    if word in SCHEMAS_BY_NAME and isinstance(value, dict):
        return {name: plain_schema(one) for name, one in value.items()}
    if word in SCHEMA_LISTS and isinstance(value, list):
        return [plain_schema(one) for one in value]
    return plain_schema(value) if word in SCHEMAS else value


def _with_prefix_items(part: dict) -> dict:
    """Draft 7: `items` is a list, and `additionalItems` what follows it."""
    if not isinstance(part.get("items"), list):
        return part
    others = {word: value for word, value in part.items() if word not in ("items", "additionalItems")}
    rest = {"items": part["additionalItems"]} if "additionalItems" in part else {}
    return {**others, "prefixItems": part["items"], **rest}


def _with_named_members(part: dict) -> dict:
    """`propertyNames` that is an enum: so many optional members."""
    named = part.get("propertyNames")
    names = named.get("enum") if isinstance(named, dict) and named.keys() <= {"type", "enum"} else None
    if not isinstance(names, list) or any(word in part for word in BESIDE_NAMES):
        return part
    others = {word: value for word, value in part.items() if word != "propertyNames"}
    properties = _given(part.get("additionalProperties", True), [name for name in names if isinstance(name, str)])
    return {**others, "properties": properties, "additionalProperties": False}


def _with_required_members(part: dict) -> dict:
    """What is required and not described is described as what `additionalProperties` says of it."""
    properties, required = part.get("properties", {}), part.get("required", [])
    missing = [name for name in required if name not in properties] if isinstance(required, list) else []  # draft 3
    if not missing or "object" not in (part.get("type") or ()) or any(word in part for word in MEMBERS_ELSEWHERE):
        return part
    member = part.get("additionalProperties", True)
    if member is False:
        raise ValueError(f"'required' has {missing[0][:100]!r}, which 'additionalProperties': false forbids")
    return {**part, "properties": {**properties, **_given(member, missing)}}


def _given(schema: Any, names: list[str]) -> dict[str, Any]:
    if len(names) * len(json.dumps(schema)) > MAX_REPEATED:
        raise ValueError(f"'additionalProperties' is too large for {len(names)} names")
    return dict.fromkeys(names, schema)


def _without_format(part: dict) -> dict:
    """`pattern` is a condition, `format` a remark; a grammar would have looked at the remark."""
    return {word: value for word, value in part.items() if word != "format" or "pattern" not in part}
