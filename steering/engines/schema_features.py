"""Which parts of JSON Schema the grammar library does not enforce. An answer must follow its schema: such a schema is
refused on every engine alike. Pure data in, words out: no library, no engine.

The rules are vLLM's for xgrammar 0.2 (`vllm/v1/structured_output/backend_xgrammar.py`), a test holds them against it;
and one that it lacks, of required members.
"""

from __future__ import annotations

from typing import Any

STRING_FORMATS = (
    "email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference",
    "uri-template", "json-pointer", "relative-json-pointer",
)  # fmt: skip
COUNTED = ("uniqueItems", "contains", "minContains", "maxContains")
SHAPES, LENGTHS = ("pattern", "format"), ("minLength", "maxLength")


def unenforced(schema: Any) -> str | None:
    """What of a schema would not be followed, in words that name the keyword; None where all would be."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            reason = _of_numbers_and_arrays(part) or _of_strings(part) or _of_objects(part) or _of_combinations(part)
            if reason is not None:
                return reason
            pending += part.values()
        elif isinstance(part, list):
            pending += [item for item in part if isinstance(item, dict)]
    return None


def _types(part: dict) -> set[str]:
    kind = part.get("type")
    return {one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str)}


def _of_numbers_and_arrays(part: dict) -> str | None:
    if _types(part) & {"integer", "number"} and "multipleOf" in part:
        return "'multipleOf' is not enforced"
    if "array" in _types(part):
        return next((f"'{word}' is not enforced" for word in COUNTED if word in part), None)
    return None


def _of_strings(part: dict) -> str | None:
    if "string" not in _types(part):
        return None
    if "format" in part and part["format"] not in STRING_FORMATS:
        return f"the format {str(part['format'])[:100]!r} is not known; known: {', '.join(sorted(STRING_FORMATS))}"
    return "'minLength' and 'maxLength' are not enforced beside 'pattern' or 'format'" if _both(part) else None


def _of_objects(part: dict) -> str | None:
    if "object" not in _types(part):
        return None
    if "propertyNames" in part:
        names = part["propertyNames"]
        if isinstance(names, dict) and _both(names):
            return "'propertyNames' with a length beside a pattern or format is not enforced"
        others = [word for word in ("patternProperties", "properties") if word in part]
        if others or part.get("unevaluatedProperties", True) is not True:
            return f"'propertyNames' beside '{[*others, 'unevaluatedProperties'][0]}' is not enforced"
    if part.get("required") and (named := [word for word in ("propertyNames", "patternProperties") if word in part]):
        return f"'required' beside '{named[0]}' is not enforced"
    patterns = part.get("patternProperties")
    if isinstance(patterns, dict) and ("properties" in part or len(patterns) > 1):
        return "'patternProperties' beside other properties is not enforced"
    return None


def _of_combinations(part: dict) -> str | None:
    parts = part.get("allOf")
    return "'allOf' of several schemas is not enforced" if isinstance(parts, list) and len(parts) > 1 else None


def _both(part: dict) -> bool:
    return any(word in part for word in SHAPES) and any(word in part for word in LENGTHS)
