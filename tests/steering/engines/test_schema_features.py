"""What is not enforced is refused, as vLLM refuses it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.engines.schema_features import unenforced

REFUSED: list[dict[str, Any]] = [
    {"type": "integer", "multipleOf": 7},
    {"type": ["number", "null"], "multipleOf": 0.5},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {}, "minContains": 2},
    {"type": "string", "format": "color"},
    {"type": "string", "format": "uuid", "maxLength": 9},
    {"type": "string", "pattern": "a", "minLength": 1},
    {"type": "object", "propertyNames": {"pattern": "a", "maxLength": 3}},
    {"type": "object", "propertyNames": {}, "properties": {}},
    {"type": "object", "propertyNames": {}, "patternProperties": {"a": {}}},
    {"type": "object", "propertyNames": {}, "unevaluatedProperties": False},
    {"type": "object", "properties": {}, "patternProperties": {"a": {}}},
    {"type": "object", "patternProperties": {"a": {}, "b": {}}},
    {"allOf": [{}, {}]},
    {"type": "object", "properties": {"a": {"anyOf": [{"type": "array", "uniqueItems": True}]}}},
]
REFUSED_HERE_ONLY: list[dict[str, Any]] = [
    {"type": "object", "propertyNames": {"pattern": "a"}, "required": ["a"]},
    {"type": "object", "patternProperties": {"a": {}}, "required": ["a"]},
]
ACCEPTED: list[dict[str, Any]] = [
    {},
    {"type": "object", "properties": {"multipleOf": {"type": "integer"}, "type": {"type": "string"}}},
    {"type": "array", "items": {"type": "string", "format": "date"}, "maxItems": 3},
    {"type": "string", "pattern": "^a+$"},
    {"type": "object", "propertyNames": {"pattern": "a"}, "unevaluatedProperties": True},
    {"type": "object", "patternProperties": {"a": {}}, "required": []},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"enum": [["x"], {"y": 1}]}}},
]
WORDS = ["multipleOf", "uniqueItems", "contains", "format", "pattern", "minLength", "maxLength", "propertyNames",
         "properties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "items", "a"]  # fmt: skip
TYPES = st.sampled_from(["integer", "number", "array", "string", "object", ["object", "null"], ["string", "array"], 3])
LEAVES = st.sampled_from([None, True, False, 3, "uuid", "color", "a"])


def objects(inner: st.SearchStrategy) -> st.SearchStrategy:
    fields = st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)
    return st.builds(lambda kind, rest: {"type": kind, **rest}, TYPES, fields) | fields


SCHEMAS = objects(st.recursive(LEAVES, lambda inner: objects(inner) | st.lists(inner, max_size=3), max_leaves=8))


@pytest.mark.parametrize("schema", REFUSED + REFUSED_HERE_ONLY, ids=str)
def test_what_the_library_would_not_enforce_is_named(schema: dict) -> None:
    assert "'" in (unenforced(schema) or "")


@pytest.mark.parametrize("schema", ACCEPTED, ids=str)
def test_what_it_enforces_is_accepted(schema: dict) -> None:
    assert unenforced(schema) is None


@pytest.mark.vllm
def test_vllm_has_the_same_rules() -> None:
    backend = pytest.importorskip("vllm.v1.structured_output.backend_xgrammar")

    @given(SCHEMAS | st.sampled_from(REFUSED + ACCEPTED))
    def same(schema: dict) -> None:
        try:
            refused = backend.has_xgrammar_unsupported_json_features(schema)
        except TypeError:  # a format that is an object; as a schema it is refused before
            return
        assert refused == (unenforced(schema) is not None)

    same()
