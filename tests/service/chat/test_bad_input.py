"""Everything wrong that a client can send to the real service: the right status, the field at fault, no harm done."""

from __future__ import annotations

import json

import httpx
import pytest
from PIL import Image

from tests.service.chat.test_json_schema import nested
from tests.service.examples import body, data_url, encoded, image_part, json_schema, picture, user
from tests.service.images.test_decoder import bare_png
from tests.service.running_server import RunningServer, any_engine_will_do

pytestmark = [pytest.mark.service, pytest.mark.slow]
CHAT = "/v1/chat/completions"
SCHEMA = "response_format.json_schema"
URL = "messages[0].content[0].image_url.url"


def post(server: RunningServer, content: dict | bytes, **headers: str) -> httpx.Response:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx.post(
        server.url + CHAT, content=raw, headers={"content-type": "application/json", **headers}, timeout=120
    )


def asked(server: RunningServer, **changes) -> dict:
    return {**body(user("hello"), model=server.name, max_tokens=2, temperature=0), **changes}


def with_image(url: str) -> dict:
    return {"messages": [user({"type": "image_url", "image_url": {"url": url}}, "what ?")]}


def with_picture(data: bytes) -> dict:
    return with_image(data_url(data))


def expect_error(response: httpx.Response, status: int, param: str | None) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]
    assert ("retry-after" in response.headers) == (status in (429, 503))
    return error


def expect_unharmed(server: RunningServer) -> None:
    answer = post(server, asked(server))
    assert answer.status_code == 200, answer.text


BAD_BODIES = {
    "remote image": (with_image("https://example.org/cat.png"), 400, URL),
    "local file": (with_image("file:///etc/passwd"), 400, URL),
    "base64 garbage": (with_image("data:image/png;base64,@@@@"), 400, URL),
    "not an image": (with_picture(b"hello" * 99), 400, URL),
    "truncated": (with_picture(encoded(Image.effect_noise((99, 99), 50))[:-500]), 400, URL),
    "0x0": (with_picture(bare_png(0, 0)), 400, URL),
    "20,000 px wide": (with_picture(encoded(picture(mode="1", size=(20_000, 500)))), 400, URL),
    "bomb": (with_picture(bare_png(65_000, 65_000)), 400, URL),
    "animated": (with_picture(encoded(picture(), save_all=True, append_images=[picture("blue")])), 400, URL),
    "too many images": ({"messages": [user(*[image_part()] * 9)]}, 400, "messages"),
    "unknown model": ({"model": "gpt-5"}, 404, "model"),
    "unknown field": ({"temprature": 1}, 400, "temprature"),
    "unknown steering field": ({"steering": {"strenght": 1}}, 400, "steering.strenght"),
    "unknown preset": ({"steering": {"preset": "none"}}, 400, "steering.preset"),
    "wrong type": ({"max_tokens": "2"}, 400, "max_tokens"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    "no such format": ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
    "no schema": ({"response_format": json_schema(schema={"type": "strng"})}, 400, f"{SCHEMA}.schema"),
    "deep schema": ({"response_format": json_schema(schema=nested(40))}, 400, f"{SCHEMA}.schema"),
    "remote schema": ({"response_format": json_schema(schema={"$ref": "http://a/"})}, 400, f"{SCHEMA}.schema"),
    "unenforced schema": (
        {"response_format": json_schema(schema={"type": "array", "uniqueItems": True})},
        400,
        f"{SCHEMA}.schema",
    ),
    "schema of no value": ({"response_format": json_schema(schema={"$ref": "#"})}, 400, f"{SCHEMA}.schema"),
    "strength -1": ({"steering": {"strength": -1}}, 400, "steering.strength"),
    "strength 7": ({"steering": {"strength": 7}}, 400, "steering.strength"),
    "no such concept": ({"steering": {"concepts": {"9999999": {"factor": 0}}}}, 400, "steering.concepts"),
    "an edit of nothing": ({"steering": {"concepts": {"1": {"times": 0}}}}, 400, "steering.concepts.1.times"),
    "an edit that is too large": ({"steering": {"concepts": {"1": {"add": 4.5}}}}, 400, "steering.concepts.1.add"),
    "too many edits": (
        {"steering": {"concepts": {str(number): {"factor": 0} for number in range(33)}}},
        400,
        "steering.concepts",
    ),
    "an explanation without image": ({"steering": {"explain": True}}, 400, "steering.explain"),
    "an explanation of what": ({"steering": {"explain": "everything"}}, 400, "steering.explain"),
    "control": ({"steering": {"control": "random"}}, 400, "steering.control"),
    "explicit steering without image": ({"steering": {"enabled": True}}, 400, "steering"),
    "empty messages": ({"messages": []}, 400, "messages"),
    "prompt longer than the context": ({"messages": [user("star " * 2000)]}, 400, "messages"),
    "max_tokens longer than the context": ({"max_tokens": 4000}, 400, "max_tokens"),
    "max_tokens beyond the limit": ({"max_tokens": 10**9}, 400, "max_tokens"),
    "n": ({"n": 100_000}, 400, "n"),
    "token id": ({"logit_bias": {"999999": 1}}, 400, "logit_bias.999999"),
    "a role of no template": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
}


OF_EACH_PART = ("unknown field", "not an image", "no schema", "prompt longer than the context")
"""Refused as JSON is read, by the decoder of pictures, with the request at hand, and by the model's replica."""


@pytest.mark.parametrize(
    ("name", "stream"), [*((name, False) for name in BAD_BODIES), *((name, True) for name in OF_EACH_PART)]
)
def test_a_bad_body(server: RunningServer, name: str, stream: bool) -> None:
    changes, status, param = BAD_BODIES[name]
    error = expect_error(post(server, asked(server, stream=stream, **changes)), status, param)
    assert "PIL" not in error["message"]
    expect_unharmed(server)


@any_engine_will_do
def test_an_endless_schema(server: RunningServer) -> None:
    """Given up after seconds; both engines try a schema in the same way."""
    endless = json_schema(schema={"type": "string", "pattern": "^((a{0,30}){0,30}){0,30}$"})
    expect_error(post(server, asked(server, response_format=endless)), 400, f"{SCHEMA}.schema")
    expect_unharmed(server)


@pytest.mark.parametrize(
    ("old", "new", "param"),
    [
        ('"temperature": 0', '"temperature": NaN', "temperature"),
        ('"temperature": 0', '"temperature": 1e999', "temperature"),
        ('"max_tokens": 2', '"max_tokens": -Infinity', "max_tokens"),
        ('"hello"', '"\\ud800"', None),
        ("}", "", None),
    ],
)
def test_bad_json(server: RunningServer, old: str, new: str, param: str | None) -> None:
    raw = json.dumps(asked(server))
    assert old in raw
    expect_error(post(server, raw.replace(old, new).encode()), 400, param)
    expect_unharmed(server)


@pytest.mark.parametrize(
    ("headers", "status", "param"),
    [
        ({"x-steering-strength": "7"}, 400, "x-steering-strength"),
        ({"x-steering-strength": "nan"}, 400, "x-steering-strength"),
        ({"content-type": "text/plain"}, 415, "content-type"),
        ({"x-request-id": "a b"}, 400, "x-request-id"),
        ({"x-request-disconnect-disabled": "?1"}, 400, "x-request-disconnect-disabled"),
    ],
)
def test_bad_headers(server: RunningServer, headers: dict[str, str], status: int, param: str) -> None:
    expect_error(post(server, asked(server), **headers), status, param)
    expect_unharmed(server)


def test_a_body_that_is_too_large(server: RunningServer) -> None:
    expect_error(post(server, b" " * (48 * 1024 * 1024 + 1)), 413, None)
    expect_unharmed(server)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/chat", 404), ("GET", CHAT, 405), ("PUT", CHAT, 405)]
)
def test_routes_that_do_not_exist(server: RunningServer, method: str, path: str, status: int) -> None:
    expect_error(httpx.request(method, server.url + path), status, None)


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(mode="CMYK"), "JPEG"),
        encoded(Image.new("RGBA", (48, 48), (255, 0, 0, 128))),
        encoded(picture(), "WEBP"),
    ],
    ids=["cmyk", "alpha", "webp"],
)
def test_unusual_pictures_are_fine(server: RunningServer, data: bytes) -> None:
    answer = post(server, asked(server, **with_picture(data)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["steering"]["applied"] is True


def test_the_context_error_has_the_numbers(server: RunningServer) -> None:
    context = server.get("/version").json()["context_tokens"]
    error = expect_error(post(server, asked(server, messages=[user("star " * 2000)])), 400, "messages")
    assert str(context) in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_after_all_of_it_nothing_runs(server: RunningServer) -> None:
    server.wait_until_idle()
