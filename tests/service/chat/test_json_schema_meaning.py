"""Schemas as clients write them: what their grammar lets through is what they say."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
import xgrammar
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from service.chat.json_schema import canonical_json_schema
from steering.engines.schema_features import unenforced

DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
FLAG, COUNT = {"type": "boolean"}, {"type": "integer"}
CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "a tuple of draft 7": (
        {**DRAFT_7, "type": "array", "items": [FLAG, COUNT], "additionalItems": False, "minItems": 2},
        [[True, 1], [True], [1, True], [True, 1, 2]],
    ),
    "a tuple and what follows": (
        {**DRAFT_7, "type": "array", "items": [FLAG], "additionalItems": COUNT, "minItems": 1},
        [[True], [True, 1, 2], [True, True], []],
    ),
    "a record of all names": (
        {"type": "object", "propertyNames": {"type": "string", "enum": ["a", "b"]}, "additionalProperties": FLAG,
         "required": ["a", "b"]},
        [{"a": True, "b": False}, {"a": True}, {}, {"a": 1, "b": 1}, {"a": True, "b": True, "c": True}],
    ),
    "a record of some names": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": FLAG},
        [{}, {"b": True}, {"a": True, "b": True}, {"c": True}, {"a": 1}],
    ),
    "a member that is required only": (
        {"type": "object", "properties": {"a": FLAG}, "required": ["a", "b"], "additionalProperties": COUNT},
        [{"a": True, "b": 1}, {"a": True, "b": 1, "c": 2}, {"a": True, "b": True}, {"a": True}],
    ),
    "an object or null": ({"type": ["object", "null"], "required": ["a"]}, [None, {"a": 1}, {}]),
    "nothing but a required member": ({"type": "object", "required": ["a"]}, [{"a": 1}, {"a": None}, {}]),
    "a pattern beside a format": (
        {"type": "string", "format": "uuid", "pattern": "^(0{8}|[1-8]{8})-x$"},
        ["00000000-x", "12345678-x", "11111111-1111-4111-8111-111111111111", "99999999-x"],
    ),
    "a pattern beside a format that grammars do not know": (
        {"type": "string", "format": "cuid", "pattern": "^c[a-z]{3}$"}, ["cabc", "abc", "cab1"]
    ),
    "all of it inside": (
        {"$ref": "#/$defs/pairs", "$defs": {"pairs": {"anyOf": [{"type": "object", "required": ["items"]}]}}},
        [{"items": [1]}, {}],
    ),
    "data that looks like a schema": (
        {"enum": [{"items": [{"format": "uuid", "pattern": "a"}]}]},
        [{"items": [{"format": "uuid", "pattern": "a"}]}, {"prefixItems": [{"pattern": "a"}]}],
    ),
    "a member called items": (
        {"type": "object", "properties": {"items": FLAG, "format": FLAG, "pattern": FLAG}, "required": ["items"],
         "additionalProperties": False},
        [{"items": True}, {"items": True, "format": True, "pattern": True}, {"format": True}],
    ),
}  # fmt: skip


def grammar_accepts(schema: str, value: Any) -> bool:
    """Whether the engines' grammar of the schema allows the value, in their way of writing JSON, and then an end."""
    characters = [chr(code) for code in range(128)]
    vocabulary = xgrammar.TokenizerInfo([*characters, "</s>"], stop_token_ids=[128])
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1)
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":")))
    return matcher.accept_string(json.dumps(value, separators=(",", ":"))) and matcher.accept_token(128)


@pytest.mark.parametrize("name", CASES)
def test_the_grammar_allows_what_the_schema_allows(name: str) -> None:
    schema, values = CASES[name]
    plain = canonical_json_schema(schema)
    says = [validator_for(schema, Draft202012Validator)(schema).is_valid(value) for value in values]
    assert says[0] is True
    assert says[-1] is False
    assert unenforced(json.loads(plain)) is None
    assert [grammar_accepts(plain, value) for value in values] == says
    assert [Draft202012Validator(json.loads(plain)).is_valid(value) for value in values] == says


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'required' has 'a'"),
        ({"type": "object", "propertyNames": {"enum": ["a"]}, "required": ["b"]}, "'required' has 'b'"),
        ({**DRAFT_7, "items": [{}, {"$ref": "#/items/0"}]}, r"'#/items/0' does not point .*\$defs"),
        ({"type": "object", "required": [str(name) for name in range(2000)]}, "more than 1000"),
        (
            {"type": "object", "required": [str(name) for name in range(2000)],
             "additionalProperties": {"title": "x" * 100}},
            "too large for 2000 names",
        ),
        ({**DRAFT_7, "type": "array", "items": [{"type": "object", "required": ["a"],
                                                 "additionalProperties": False}]}, "'required' has 'a'"),
    ],
)  # fmt: skip
def test_what_cannot_be_put_plainly_is_refused(schema: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        canonical_json_schema(schema)


@pytest.mark.parametrize("word", ["propertyNames", "required", "properties", "items", "enum"])
@pytest.mark.parametrize("number", ["03", "04", "06", "07"])
def test_whatever_old_dialects_have_there_is_a_schema_or_a_value_error(word: str, number: str) -> None:
    for value in (True, 3, {"enum": 3}, [], [{}]):
        with suppress(ValueError):
            canonical_json_schema({"$schema": f"http://json-schema.org/draft-{number}/schema#", word: value})
