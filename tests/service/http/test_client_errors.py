"""Every documented error as the official Python client shows it: its class, code, param and what it may wait for.

In process, over a scripted model: each is brought about as in earnest; where the model has to fail for it, the script
does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2  # what the client is made of
import openai
import pytest

from service.errors import ERROR_KINDS, ApiError
from tests.service.callers.test_access import Service, secret
from tests.service.examples import body, data_url, delta, user

CLASSES = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    405: openai.APIStatusError,
    408: openai.APIStatusError,
    413: openai.APIStatusError,
    415: openai.APIStatusError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
}
"""Status to the client's class."""
PATIENCE_S = 60


class Caller:
    """The official client over the service in process."""

    def __init__(self, service: Service, http: httpx2.AsyncClient, drain_file: Path) -> None:
        self.service, self.drain_file, self._http = service, drain_file, http

    def client(self, key: str = "chatter", **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url="http://test/v1",
            api_key=secret(key),
            http_client=self._http,
            **{"max_retries": 0, **options},
        )

    async def chat(self, *messages: dict, key: str = "chatter", extra: dict | None = None, **changes: Any) -> Any:
        fields = body(*messages, **changes)
        return await self.client(key).chat.completions.create(**fields, extra_body=extra)

    async def post(self, path: str, content: Any = b"{}", media_type: str = "application/json") -> Any:
        options: Any = {"headers": {"content-type": media_type}}
        return await self.client().post(path, cast_to=object, content=content, options=options)

    async def get(self, path: str, key: str) -> Any:
        return await self.client(key).get(path, cast_to=object)

    def fails(self, error: Exception) -> None:
        """The model will."""
        self.service.model.events = (error,)

    def hangs(self) -> tuple[asyncio.Event, asyncio.Event]:
        """The model will; the events say that it was asked, and that it was told to stop."""
        asked, closed = asyncio.Event(), asyncio.Event()

        async def hang(_job: Any) -> AsyncIterator[Any]:
            asked.set()
            try:
                await asyncio.sleep(PATIENCE_S)
                yield
            finally:
                closed.set()

        self.service.model.generate = hang  # pyright: ignore[reportAttributeAccessIssue]
        return asked, closed


@pytest.fixture
async def caller(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Caller]:
    """A parameter is the time limit of a request, in seconds."""
    drain_file = tmp_path / "drain"
    limits = {"max_body_bytes": 10_000, "body_timeout_s": 0.2, "max_concurrent_requests": 1}
    limits["request_timeout_s"] = getattr(request, "param", PATIENCE_S)
    service = Service(tmp_path, drain_file=str(drain_file), drain_timeout_s=0, **limits)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=service.api)) as http:
        yield Caller(service, http, drain_file)
    service.decoder.close()
    await service.http.aclose()


async def twice_over_quota(caller: Caller) -> None:
    for _ in range(3):
        await caller.chat(key="limited")


async def slow_body(caller: Caller) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(PATIENCE_S)

    await caller.post("/chat/completions", pieces())


async def one_too_many(caller: Caller) -> None:
    asked, _closed = caller.hangs()
    busy = asyncio.create_task(caller.chat())
    await asked.wait()
    try:
        await caller.chat()
    finally:
        busy.cancel()


async def too_slow(caller: Caller) -> None:
    caller.hangs()
    await caller.chat()


async def while_draining(caller: Caller) -> None:
    caller.drain_file.touch()
    await caller.chat()


async def with_a_failing_model(caller: Caller, error: Exception) -> None:
    caller.fails(error)
    await caller.chat()


CASES: dict[str, tuple[Callable[[Caller], Awaitable[Any]], str | None]] = {
    "invalid_json": (lambda caller: caller.post("/chat/completions", b"{"), None),
    "invalid_value": (lambda caller: caller.chat(max_tokens=0), "max_tokens"),
    "missing_field": (lambda caller: caller.post("/chat/completions", b'{"model": "tiny"}'), "messages"),
    "unknown_field": (lambda caller: caller.chat(extra={"temprature": 1}), "temprature"),
    "unsupported_value": (lambda caller: caller.chat(store=True), "store"),
    "invalid_header": (lambda caller: caller.chat(extra_headers={"x-steering-strength": "7"}), "x-steering-strength"),
    "invalid_image": (
        lambda caller: caller.chat(user({"type": "image_url", "image_url": {"url": data_url(b"none")}})),
        "messages[0].content[0].image_url.url",
    ),
    "invalid_steering": (
        lambda caller: with_a_failing_model(caller, ApiError("invalid_steering", "no image", param="steering")),
        "steering",
    ),
    "context_length_exceeded": (
        lambda caller: with_a_failing_model(caller, ApiError("context_length_exceeded", "300", param="messages")),
        "messages",
    ),
    "invalid_api_key": (lambda caller: caller.chat(key="nobody"), None),
    "permission_denied": (lambda caller: caller.chat(key="scraper"), None),
    "concept_not_found": (lambda caller: caller.get("/concepts/999999", "explainer"), None),
    "model_not_found": (lambda caller: caller.chat(model="gpt-5"), "model"),
    "request_not_found": (
        lambda caller: caller.post("/feedback", b'{"request_id": "chatcmpl-1", "score": 1}'), "request_id"
    ),
    "route_not_found": (lambda caller: caller.post("/embeddings"), None),
    "method_not_allowed": (lambda caller: caller.post("/models"), None),
    "body_timeout": (slow_body, None),
    "request_too_large": (lambda caller: caller.chat(user("x" * 10_000)), None),
    "unsupported_media_type": (
        lambda caller: caller.post("/chat/completions", media_type="text/plain"), "content-type"
    ),
    "rate_limit_exceeded": (twice_over_quota, None),
    "overloaded": (one_too_many, None),
    "engine_unavailable": (lambda caller: with_a_failing_model(caller, ApiError("engine_unavailable", "lost")), None),
    "shutting_down": (while_draining, None),
    "request_timeout": (too_slow, None),
    "bad_artifact": (lambda caller: with_a_failing_model(caller, ApiError("bad_artifact", "of another model")), None),
    "internal_error": (lambda caller: with_a_failing_model(caller, KeyError("a secret")), None),
}  # fmt: skip


@pytest.mark.parametrize(
    ("caller", "code"),
    [(0.5 if code == "request_timeout" else PATIENCE_S, code) for code in ERROR_KINDS],
    indirect=["caller"],
)
async def test_every_error(caller: Caller, code: str) -> None:
    bring_about, param = CASES[code]
    with pytest.raises(openai.APIStatusError) as caught:
        await bring_about(caller)
    error, kind = caught.value, ERROR_KINDS[code]
    assert type(error) is CLASSES[kind.status]
    assert (error.status_code, error.code, error.param, error.type) == (kind.status, code, param, kind.type)
    assert "secret" not in error.message
    assert error.request_id
    assert ("retry-after" in error.response.headers) == (kind.status in (429, 503))
    assert ("www-authenticate" in error.response.headers) == (kind.status == 401)
    assert ("allow" in error.response.headers) == (kind.status == 405)


@pytest.mark.parametrize("code", ["shutting_down", "engine_unavailable", "request_timeout"])
async def test_an_error_inside_a_stream_is_raised_and_keeps_its_code(caller: Caller, code: str) -> None:
    caller.service.model.events = (delta(0, "a"), ApiError(code, "in the middle"))
    stream = await caller.chat(stream=True)
    assert [(await anext(stream)).choices[0].delta.content for _ in range(2)] == ["", "a"]
    with pytest.raises(openai.APIError, match="in the middle") as caught:
        await anext(stream)
    assert caught.value.code == code


async def test_the_client_tries_again_when_it_is_told_to(caller: Caller) -> None:
    model, asked = caller.service.model, []
    answer = model.generate

    async def busy_once(job: Any) -> AsyncIterator[Any]:
        asked.append(job)
        if len(asked) == 1:
            raise ApiError("overloaded", "full")
        async for event in answer(job):
            yield event

    model.generate = busy_once  # pyright: ignore[reportAttributeAccessIssue]
    completion = await caller.client(max_retries=1).chat.completions.create(**body())
    assert completion.choices[0].message.content == "a star"
    assert len(asked) == 2


async def test_a_client_s_own_limit_frees_the_model(caller: Caller) -> None:
    asked, closed = caller.hangs()
    chat = asyncio.create_task(caller.chat())
    await asked.wait()
    chat.cancel()
    await asyncio.wait_for(closed.wait(), PATIENCE_S / 2)
