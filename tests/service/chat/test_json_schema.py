"""A client's schema: what passes keeps its meaning, what is too much or no schema is refused with the reason."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.chat.json_schema import MAX_DEPTH, MAX_PARTS, MAX_SCHEMA_BYTES, canonical_json_schema

PLACE = {
    "type": "object",
    "properties": {"where": {"enum": ["left", "right"]}, "a": {"$ref": "#/$defs/count"}},
    "required": ["where", "a"],
    "additionalProperties": False,
    "$defs": {"count": {"type": "integer", "minimum": 0}},
}


def nested(levels: int) -> dict:
    schema: dict = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


def test_a_schema_keeps_its_meaning_and_its_order() -> None:
    text = canonical_json_schema(PLACE)
    assert json.loads(text) == PLACE
    assert text.index('"where"') < text.index('"a"')
    assert " " not in text


@pytest.mark.parametrize("pattern", ["a{99999999999999999999}", "(" * 3000 + ")" * 3000])
def test_a_pattern_that_python_cannot_take_is_the_schema_s_fault(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        canonical_json_schema({"type": "string", "pattern": pattern})


def test_references_into_the_schema() -> None:
    canonical_json_schema({"properties": {"inner": {"$ref": "#"}}})
    canonical_json_schema({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {}}})
    canonical_json_schema({"$ref": "#/anyOf/1", "anyOf": [{}, {}]})


def test_older_dialects_are_known() -> None:
    tuple_of_draft_7: dict = {"type": "array", "items": [{"type": "integer"}]}
    with pytest.raises(ValueError, match="at '/items'"):
        canonical_json_schema(tuple_of_draft_7)
    assert canonical_json_schema({"$schema": "http://json-schema.org/draft-07/schema#", **tuple_of_draft_7})


def test_the_limits_themselves_are_allowed() -> None:
    canonical_json_schema(nested(MAX_DEPTH))
    canonical_json_schema({"anyOf": [{}] * (MAX_PARTS - 2)})
    canonical_json_schema({"title": "x" * (MAX_SCHEMA_BYTES - len('{"title":""}'))})


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (None, "object"),
        (True, "object"),
        ([], "object"),
        (nested(MAX_DEPTH + 1), "deeper than 32"),
        ({"enum": [nested(MAX_DEPTH)]}, "deeper than 32"),
        ({"anyOf": [{}] * (MAX_PARTS - 1)}, "more than 1000"),
        ({"anyOf": [True] * 10_000}, "more than 1000"),
        ({"title": "x" * MAX_SCHEMA_BYTES}, "65536 bytes"),
        ({"$ref": "https://example.org/schema.json"}, "example.org.* does not point"),
        ({"items": {"$ref": "file:///etc/passwd"}}, "does not point"),
        ({"$ref": "#/$defs/a"}, "does not point"),
        ({"$ref": "#/$defs/a/2", "$defs": {"a": [{}, {}]}}, "does not point"),
        ({"$ref": "$defs/a", "$defs": {"a": {}}}, "does not point"),
        ({"$ref": ""}, "does not point"),
        ({"type": "strng"}, "at '/type': 'strng'"),
        ({"properties": {"a": {"required": "b"}}}, "at '/properties/a/required'"),
        ({"pattern": "("}, "at '/pattern'"),
        ({"$schema": []}, r"at '/\$schema'"),
        ({"maximum": float("nan")}, "JSON"),
        ({"const": float("inf")}, "JSON"),
    ],
)
def test_what_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        canonical_json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [{"anyOf": [{}] * 900}, {"allOf": [{"not": True}] * 450}, {"properties": {str(index): {} for index in range(900)}}],
    ids=["wide", "pairs", "properties"],
)
def test_the_largest_are_checked_soon_enough_for_the_other_requests(schema: dict) -> None:
    began = time.process_time()
    canonical_json_schema(schema)
    assert time.process_time() - began < 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["type", "properties", "$ref", "$schema", "items", "pattern", "anyOf", "$id"])
                | st.text(),
                inner,
                max_size=3,
            )
        ),
        max_leaves=12,
    )
)
def test_anything_is_a_schema_or_a_value_error(value: Any) -> None:
    try:
        text = canonical_json_schema(value)
    except ValueError:
        return
    assert json.loads(text) == value
