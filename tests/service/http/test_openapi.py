"""The OpenAPI document: whole, true to the routes and the error table, and its examples valid by it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from service.chat.schemas import ChatCompletionRequest
from service.errors import ERROR_KINDS
from service.http.answers import SteeredChunk, SteeredCompletion
from service.http.openapi import build_openapi
from service.http.routes import ROUTES
from service.settings import Settings

SETTINGS = Settings(model="/models/tiny", artifact="/a", max_choices=3, max_tokens_limit=99, image_hosts="a.example")
DOCUMENT = build_openapi(SETTINGS, with_keys=True)
OPERATIONS = [
    (f"{method} {path}", operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
CHAT = DOCUMENT["paths"]["/v1/chat/completions"]["post"]


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    """Of a part of the document, with the components it points to."""
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def bodies() -> list[tuple[str, dict[str, Any]]]:
    """Every media type object of JSON in the document, with a name."""
    found = []
    for name, operation in OPERATIONS:
        parts = [("body", operation.get("requestBody")), *operation["responses"].items()]
        found += [
            (f"{name} {part}", media)
            for part, described in parts
            if described
            for kind, media in described.get("content", {}).items()
            if kind == "application/json"
        ]
    return found


def examples_of(media: dict[str, Any]) -> list[Any]:
    given = [media["example"]] if "example" in media else []
    return given + [example["value"] for example in media.get("examples", {}).values()]


def test_it_is_openapi() -> None:
    schemathesis.openapi.from_dict(DOCUMENT).validate()


def test_every_reference_leads_somewhere_and_every_component_is_used() -> None:
    text = json.dumps(DOCUMENT)
    used = {part.split('"')[0] for part in text.split('"$ref": "#/components/')[1:]}
    there = {f"{kind}/{name}" for kind in ("schemas", "headers", "parameters") for name in DOCUMENT["components"][kind]}
    assert there == used
    for schema in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_every_operation_has_its_scope() -> None:
    scopes = {route.path.replace(":path}", "}"): route.scope for route in ROUTES}
    assert set(DOCUMENT["paths"]) == set(scopes)
    for name, operation in OPERATIONS:
        scope = scopes[name.split()[1]]
        assert operation["security"] == ([{"key": [scope]}] if scope else []), name
        assert ("401" in operation["responses"]) == (scope is not None), name
    ids = [operation["operationId"] for _, operation in OPERATIONS]
    assert len(set(ids)) == len(ids)


def test_a_service_without_keys_asks_for_none() -> None:
    paths = build_openapi(SETTINGS, with_keys=False)["paths"]
    for methods in paths.values():
        for operation in methods.values():
            assert operation["security"] == []
            assert not {"401", "403", "429"} & set(operation["responses"])


def test_every_error_is_documented_with_its_headers() -> None:
    codes = set()
    for _, operation in OPERATIONS:
        for status, response in operation["responses"].items():
            assert "x-request-id" in response["headers"]
            assert ("Retry-After" in response["headers"]) == (status in ("429", "503"))
            if status >= "400":
                here = set(response["content"]["application/json"]["examples"])
                assert {ERROR_KINDS[code].status for code in here} == {int(status)}
                codes |= here
    assert codes == set(ERROR_KINDS) - {"method_not_allowed"}, "that belongs to no operation"


@pytest.mark.parametrize(("name", "media"), bodies(), ids=[name for name, _ in bodies()])
def test_examples_are_valid(name: str, media: dict[str, Any]) -> None:
    examples = examples_of(media)
    assert examples or name.endswith(" 200")
    for example in examples:
        validator(media["schema"]).validate(example)


def test_an_error_s_schema_knows_its_codes() -> None:
    schema = CHAT["responses"]["413"]["content"]["application/json"]["schema"]
    wrong = {"error": {"message": "m", "type": "t", "param": None, "code": "invalid_json"}}
    assert not validator(schema).is_valid(wrong)
    assert not validator(schema).is_valid({"error": {"message": "m"}})


def test_the_request_s_examples_are_what_the_service_takes() -> None:
    media = CHAT["requestBody"]["content"]["application/json"]
    for example in examples_of(media):
        ChatCompletionRequest.model_validate_json(json.dumps(example))


def test_the_stream_s_example_is_made_of_chunks() -> None:
    events = CHAT["responses"]["200"]["content"]["text/event-stream"]["example"].split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [SteeredChunk.model_validate_json(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks[-1].steering is not None
    with pytest.raises(ValidationError):
        SteeredCompletion.model_validate_json(events[0].removeprefix("data: "))


def test_the_settings_limits_are_in_it() -> None:
    request = DOCUMENT["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert request["model"]["enum"] == ["tiny", "tiny:off", "tiny:steered"]
    assert request["n"]["anyOf"][0]["maximum"] == 3
    assert request["max_completion_tokens"]["anyOf"][0]["maximum"] == 99
    assert "a.example" in DOCUMENT["components"]["schemas"]["ImageUrl"]["properties"]["url"]["description"]


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"stop": "x"}, True),
        ({"stop": ["x"] * 5}, False),
        ({"tools": []}, True),
        ({"tools": [{}], "tool_choice": "none"}, True),
        ({"tools": ["f"]}, False),
        ({"tool_choice": "required"}, False),
        ({"store": False}, True),
        ({"store": True}, False),
        ({"logit_bias": {"12": 1}}, True),
        ({"logit_bias": {"x": 1}}, False),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}, True),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": "{}"}}}, False),
        ({"steering": {"strength": 0.5, "concepts": None, "control": "none"}}, True),
        ({"steering": {"control": "random"}}, False),
        ({"steering": {"min_answer_tokens": 0}}, True),
        ({"steering": {"min_answer_tokens": 1025}}, False),
        ({"steering": {"concepts": {"1": {"factor": 0}}, "explain": "tokens"}}, True),
        ({"steering": {"concepts": {"1": {"factor": 5}}}}, False),
        ({"steering": {"explain": "all"}}, False),
        ({"n": 4}, False),
        ({"nonsense": 1}, False),
    ],
)
def test_the_schema_says_what_the_service_does(changes: dict[str, Any], valid: bool) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **changes}
    schema = {"$ref": "#/components/schemas/ChatCompletionRequest"}
    assert validator(schema).is_valid(body) == valid
