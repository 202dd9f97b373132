"""What counts as structure, and that refusing a body costs nothing like validating it."""

from __future__ import annotations

import json
import threading
import tracemalloc

import pytest
from pydantic import ValidationError

from service.chat.schemas import ChatCompletionRequest
from service.errors import ApiError
from service.http.body import MAX_ESCAPES, MAX_TOKENS, check_structure, parse_in_time
from tests.service.examples import body, parse_chat, text_part, user

HALF = MAX_TOKENS // 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"a": "' + b"," * 10 * MAX_TOKENS + b'"}',
        b'{"a": "' + b'\\"[{' * 10 * MAX_TOKENS + b'"}',
        b'{"a": "' + b",[" * 10 * MAX_TOKENS,
        b'["\\\\",' + b"1," * (MAX_TOKENS // 4) + b"1]",
        b"1," * HALF,
    ],
    ids=["nothing", "commas in a text", "quotes in a text", "a text without end", "a backslash", "half as many"],
)
def test_long_texts_are_no_structure(content: bytes) -> None:
    check_structure(content)


@pytest.mark.parametrize(
    "content",
    [
        b"1," * (MAX_TOKENS + 1),
        b"[" * (MAX_TOKENS + 1),
        b'{"a":' * (HALF + 1),
        b'"\\\\",' * (HALF + 1),
        b'""' * MAX_TOKENS + b",[{" * MAX_TOKENS,
    ],
    ids=["numbers", "arrays", "objects", "texts", "texts without commas"],
)
def test_too_many_values(content: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        check_structure(content)
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


def test_the_longest_conversation_is_accepted() -> None:
    turns = [user(*[text_part('a "quoted", [bracketed] text')] * 3)] * 1024
    assert len(parse_chat(json.dumps(body(*turns)).encode()).messages) == 1024


@pytest.mark.parametrize(
    "content",
    [
        b'{"model":"m","messages":[{"role":"user","content":[' + b"1," * 5_000_000 + b"1]}]}",
        b'{"model":"m","messages":[' + b"1," * 5_000_000 + b"1]}",
        b"{" + b",".join(b'"%x":1' % index for index in range(1_000_000)) + b"}",
    ],
    ids=["parts", "messages", "fields"],
)
def test_refusing_takes_little_memory(content: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(ApiError, match="at most"):
        parse_chat(content)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000


def test_of_many_wrong_parts_only_the_first_is_judged() -> None:
    content = {**body(), "messages": [{"role": "user", "content": [1] * 1000}]}
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate_json(json.dumps(content))
    assert caught.value.error_count() == 1


def test_escapes_are_counted_too() -> None:
    check_structure(b'"' + b"\\n" * MAX_ESCAPES + b'"')
    with pytest.raises(ApiError, match="at most 2000000 backslashes") as caught:
        check_structure(b'"' + b"\\n" * (MAX_ESCAPES + 1) + b'"')
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


@pytest.mark.parametrize(("text_bytes", "in_loop"), [(1000, True), (1024 * 1024, False)])
async def test_large_bodies_are_read_in_a_thread(
    text_bytes: int, in_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    monkeypatch.setattr("service.http.body.check_structure", lambda _body: threads.append(threading.current_thread()))
    await parse_in_time(json.dumps(body(user("x" * text_bytes))).encode(), ChatCompletionRequest)
    assert (threads == [threading.current_thread()]) == in_loop
