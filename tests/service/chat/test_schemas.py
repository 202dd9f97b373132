"""The request body: what OpenAI knows is accepted or refused by name, never ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import chat
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from pydantic import BaseModel

from service.chat import schemas
from service.chat.schemas import ChatCompletionRequest, SchemaFormat
from service.errors import ApiError
from tests.service.examples import body, image_part, json_schema, parse_chat, user


def refused(content: Any) -> ApiError:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(ApiError) as caught:
        parse_chat(raw)
    return caught.value


def test_every_field_of_the_openai_package_is_known() -> None:
    ours = set(ChatCompletionRequest.model_fields)
    assert set(CompletionCreateParamsStreaming.__annotations__) - ours == set()
    assert ours - set(CompletionCreateParamsStreaming.__annotations__) == {"top_k", "steering"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (schemas.InstructionMessage, chat.ChatCompletionSystemMessageParam),
        (schemas.InstructionMessage, chat.ChatCompletionDeveloperMessageParam),
        (schemas.UserMessage, chat.ChatCompletionUserMessageParam),
        (schemas.AssistantMessage, chat.ChatCompletionAssistantMessageParam),
        (schemas.AssistantMessage, chat.ChatCompletionMessage),
        (schemas.TextPart, chat.ChatCompletionContentPartTextParam),
        (schemas.ImagePart, chat.ChatCompletionContentPartImageParam),
        (schemas.ImageUrl, ImageURL),
        (schemas.RefusalPart, chat.ChatCompletionContentPartRefusalParam),
        (schemas.StreamOptions, chat.ChatCompletionStreamOptionsParam),
    ],
)
def test_every_field_of_openai_s_messages_is_known(ours: type[BaseModel], theirs: type) -> None:
    assert set(theirs.__annotations__) - set(ours.model_fields) == set()


def test_a_full_request() -> None:
    asked = parse_chat(
        json.dumps(
            body(
                {"role": "developer", "content": "be brief"},
                user(image_part(), "what is it?"),
                {"role": "assistant", "content": "a star"},
                user("sure?"),
                max_completion_tokens=5,
                temperature=0,
                top_p=1,
                top_k=3,
                n=2,
                stop="x",
                seed=-1,
                stream=True,
                stream_options={"include_usage": True},
                logprobs=True,
                top_logprobs=2,
                presence_penalty=1,
                frequency_penalty=-2,
                logit_bias={"12": -100},
                user="me",
                metadata={"a": "b"},
                steering={"strength": 0.5, "preset": "captions"},
            )
        ).encode()
    )
    assert asked.stop == ["x"]
    assert asked.steering is not None
    assert asked.steering.strength == 0.5
    assert [part.type for part in asked.messages[1].content or () if not isinstance(part, str)] == [
        "image_url",
        "text",
    ]


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [
        ("tools", [], [{"type": "function"}]),
        ("tool_choice", "auto", "required"),
        ("functions", [], [{}]),
        ("tool_choice", "none", {"type": "function", "function": {"name": "f"}}),
        ("function_call", "none", {"name": "f"}),
        ("store", False, True),
        ("modalities", ["text"], ["text", "audio"]),
        ("service_tier", "auto", "flex"),
        ("prediction", None, {"type": "content"}),
        ("audio", None, {}),
        ("reasoning_effort", "none", "high"),
        ("web_search_options", None, {}),
        ("store", None, 0),
    ],
)
def test_known_fields_take_neutral_values_only(name: str, neutral: Any, other: Any) -> None:
    parse_chat(json.dumps(body(**{name: neutral})).encode())
    error = refused(body(**{name: other}))
    assert (error.code, error.param, error.status) == ("unsupported_value", name, 400)


def test_fields_that_change_no_answer_are_accepted() -> None:
    cached = {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}
    url = image_part()["image_url"]
    parts = [{"type": "text", "text": "what?", **cached}]
    parts += [{"type": "image_url", "image_url": {**url, "detail": one}} for one in ("auto", "low", "high", "original")]
    asked = parse_chat(
        json.dumps(
            body(
                {"role": "system", "content": "be brief", "name": "n" * 64},
                {"role": "user", "content": parts, "name": "ann"},
                {"role": "assistant", "content": "a star", "name": ""},
                user("sure?"),
                logprobs=False,
                top_logprobs=0,
                prompt_cache_options={"mode": "implicit", "ttl": "30m"},
                prompt_cache_retention="24h",
            )
        ).encode()
    )
    assert [message.name for message in asked.messages] == ["n" * 64, "ann", "", None]


def test_an_answer_of_ours_can_be_sent_back() -> None:
    for content, refusal in (("a star", None), (None, "I can't."), (None, None)):
        message = ChatCompletionMessage(role="assistant", content=content, refusal=refusal, tool_calls=[])
        parse_chat(json.dumps(body(user("and?"), message.model_dump(), user("sure?"))).encode())


def test_an_answer_as_litellm_sends_it_back_is_one() -> None:
    message = {"role": "assistant", "content": "a star", "tool_calls": None, "function_call": None}
    parse_chat(json.dumps(body(user("and?"), {**message, "provider_specific_fields": {"refusal": None}})).encode())
    error = refused(body({**message, "provider_specific_fields": "x"}))
    assert error.param == "messages[0].provider_specific_fields"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(("field", "choice"), [("tools", "tool_choice"), ("functions", "function_call")])
def test_tools_that_are_not_to_be_called_are_accepted_and_others_named(field: str, choice: str) -> None:
    parse_chat(json.dumps(body(**{field: [TOOL] * 128, choice: "none", "parallel_tool_calls": True})).encode())
    for chosen in ({}, {choice: None}, {choice: "auto"}):
        error = refused({**body(), field: [TOOL], **chosen})
        assert (error.code, error.param, error.status) == ("unsupported_value", field, 400)
        assert f'{choice}: "none"' in error.message
        assert "response_format" in error.message
    for forced in ("required", {"type": "function", "function": {"name": "f"}}):
        error = refused({**body(), field: [TOOL], choice: forced})
        assert (error.code, error.param) == ("unsupported_value", choice)
        assert "response_format" in error.message
    for malformed in ("f", {}, ["f"], [TOOL] * 129):
        assert (refused(body(**{field: malformed, choice: "none"})).param or "").startswith(field)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"nope": 1}, "nope"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": 3}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [user({"type": "refusal", "refusal": "no"})]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "system", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": [image_part()]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "messages[0].content[0].refusal"),
        ({"messages": [{"role": "assistant", "refusal": 3}]}, "messages[0].refusal"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [user({"type": "input_audio"})]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "system", "content": [image_part()]}]}, "messages[0].content[0].type"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "data:", "detail": "huge"}})]},
            "messages[0].content[0].image_url.detail",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "name": "n" * 65}]}, "messages[0].name"),
        (
            {"messages": [user({"type": "text", "text": "x", "prompt_cache_breakpoint": {}})]},
            "messages[0].content[0].prompt_cache_breakpoint.mode",
        ),
        ({"prompt_cache_options": {"ttl": "1h"}}, "prompt_cache_options.ttl"),
        ({"prompt_cache_retention": "1h"}, "prompt_cache_retention"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"steering": {"strength": 7}}, "steering.strength"),
        ({"steering": {"strength": -1}}, "steering.strength"),
        ({"steering": {"strenght": 1}}, "steering.strenght"),
        ({"steering": {"min_answer_tokens": -1}}, "steering.min_answer_tokens"),
        ({"steering": {"min_answer_tokens": 1025}}, "steering.min_answer_tokens"),
        ({"steering": {"min_answer_tokens": 2.5}}, "steering.min_answer_tokens"),
        ({"steering": {"form": "best"}}, "steering.form"),
        ({"steering": 1}, "steering"),
        ({"model": None}, "model"),
        ({"response_format": "json"}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": json_schema(name="")}, "response_format.json_schema.name"),
        ({"response_format": json_schema(name="a b")}, "response_format.json_schema.name"),
        ({"response_format": json_schema(strict="yes")}, "response_format.json_schema.strict"),
        ({"response_format": json_schema(schemas={})}, "response_format.json_schema.schemas"),
        ({"response_format": json_schema(schema="{}")}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(schema={"type": "strng"})}, "response_format.json_schema.schema"),
    ],
)
def test_errors_name_the_field(changes: dict, param: str) -> None:
    error = refused({**body(), **changes})
    assert (error.status, error.param) == (400, param)
    assert error.message.startswith(param)


def test_a_response_format() -> None:
    for kind in ("text", "json_object"):
        asked = parse_chat(json.dumps(body(response_format={"type": kind})).encode()).response_format
        assert asked is not None
        assert asked.type == kind
    full = json_schema(strict=True, description="a place")
    asked = parse_chat(json.dumps(body(response_format=full)).encode()).response_format
    assert isinstance(asked, SchemaFormat)
    assert asked.json_schema.canonical == '{"type":"object"}'


def test_a_schema_is_required() -> None:
    error = refused(body(response_format={"type": "json_schema", "json_schema": {"name": "place"}}))
    assert (error.code, error.param) == ("missing_field", "response_format.json_schema.schema")


@pytest.mark.parametrize("name", ["model", "messages"])
def test_missing_fields(name: str) -> None:
    content = body()
    del content[name]
    error = refused(content)
    assert (error.code, error.param) == ("missing_field", name)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_numbers_that_are_none(number: bytes) -> None:
    content = json.dumps(body(temperature=0)).encode()
    error = refused(content.replace(b'"temperature": 0', b'"temperature": ' + number))
    assert (error.status, error.param) == (400, "temperature")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff", b"[" * 10_000, b'{"a":' + b"1" * 5000 + b"}", b'{"a":"\\ud800"}'],
)
def test_what_is_not_a_json_object(content: bytes) -> None:
    assert refused(content).status == 400


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from([*ChatCompletionRequest.model_fields]),
)
def test_any_value_in_any_field_is_valid_or_a_400(value: Any, name: str) -> None:
    answer = None
    try:
        parse_chat(json.dumps({**body(), name: value}).encode())
    except ApiError as error:
        answer = error
    assert answer is None or (answer.status == 400 and answer.response().body)


def test_neutral_values_are_compared_with_their_type() -> None:
    """0 == False in Python; to a client they are different things."""
    assert refused(body(store=0)).param == "store"
    assert refused(body(parallel_tool_calls=1)).param == "parallel_tool_calls"
