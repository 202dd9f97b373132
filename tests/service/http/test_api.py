"""All routes in process, with a scripted model behind them: statuses, shapes, headers, what is given back."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from service import VERSION
from service.chat.admission import LoadEstimate
from service.errors import ApiError
from service.http.api import build_api
from service.http.openapi import build_openapi
from service.images.decoder import DecoderLimits, ImageDecoder
from service.metrics.exposition import Metrics
from service.settings import Settings
from steering.engines.base import Health
from tests.service.examples import ScriptedModel, body, delta, end, image_part, user

SETTINGS = Settings(
    model="/models/tiny", artifact="/a", allow_anonymous=True, max_body_bytes=100_000, max_concurrent_requests=2
)
CHAT = "/v1/chat/completions"


class Server:
    """The API over a scripted model, and a client for it."""

    def __init__(self, model: ScriptedModel, settings: Settings) -> None:
        limits = DecoderLimits()
        self.model, self.decoder = model, ImageDecoder(workers=1, limits=limits)
        self.api = build_api(settings, model, self.decoder)
        transport = httpx.ASGITransport(app=self.api)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def chat(self, content: dict | bytes | None = None, **headers: str) -> httpx.Response:
        raw = content if isinstance(content, bytes) else json.dumps(content or body()).encode()
        return await self.client.post(CHAT, content=raw, headers={"content-type": "application/json", **headers})

    async def metric(self, start: str) -> float | None:
        text = (await self.client.get("/metrics")).text
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(start)), None)


@pytest.fixture
async def serve() -> AsyncIterator:
    servers = []

    def start(*events, settings: Settings = SETTINGS) -> Server:
        servers.append(Server(ScriptedModel(*events), settings))
        return servers[-1]

    yield start
    for server in servers:
        server.decoder.close()
        await server.client.aclose()


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_a_chat(serve) -> None:
    server = serve()
    response = await server.chat(body(user(image_part(), "what?"), model="tiny:steered"))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == "a star"
    assert (answer["model"], answer["system_fingerprint"]) == ("tiny:steered", "fp_test")
    (job,) = server.model.jobs
    assert job.steering.explicit
    assert answer["id"] == job.request_id
    assert (len(job.images), server.model.closed) == (1, 1)
    assert await server.metric('vlsae_requests_total{applied="true",arm="none",artifact="main",finish="stop"}') == 1


async def test_a_stream(serve) -> None:
    response = await serve().chat(body(stream=True, stream_options={"include_usage": True}))
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert json.loads(blocks[-3][6:])["steering"]["applied"] is True


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (ApiError("invalid_steering", "steering: add an image", param="steering"), 400),
        (ApiError("overloaded", "full"), 503),
        (ValueError("a secret path"), 500),
    ],
)
async def test_before_the_first_token_an_error_has_its_status(serve, failure, status: int, stream: bool) -> None:
    server = serve(failure)
    response = await server.chat(body(stream=stream))
    assert response.status_code == status
    error = error_of(response)
    assert "secret" not in error["message"]
    assert ("retry-after" in response.headers) == (status == 503)
    assert await server.metric(f'vlsae_rejections_total{{arm="none",reason="{error["code"]}"}}') == 1
    assert server.model.closed == 1


async def test_after_it_the_stream_ends_with_an_error_event(serve) -> None:
    response = await serve(delta(0, "a"), ApiError("engine_unavailable", "lost")).chat(body(stream=True))
    assert response.status_code == 200
    blocks = [block for block in response.text.split("\n\n") if block]
    assert json.loads(blocks[-1][6:])["error"]["code"] == "engine_unavailable"
    assert "[DONE]" not in response.text


@pytest.mark.parametrize(
    ("content", "headers", "status", "param"),
    [
        (b"{", {}, 400, None),
        (b"x" * 100_001, {}, 413, None),
        (b"{}", {"content-type": "text/plain"}, 415, "content-type"),
        (b"{}", {"content-type": "multipart/form-data"}, 415, "content-type"),
        (json.dumps(body(model="other")).encode(), {}, 404, "model"),
        (json.dumps(body()).encode(), {"x-steering-strength": "7"}, 400, "x-steering-strength"),
        (json.dumps(body()).encode(), {"x-request-id": "a b"}, 400, "x-request-id"),
        (json.dumps(body()).encode(), {"x-request-id": "a" * 129}, 400, "x-request-id"),
        (json.dumps(body()).encode(), {"x-request-disconnect-disabled": "?1"}, 400, "x-request-disconnect-disabled"),
        (json.dumps(body()).encode(), {"x-request-timeout-seconds": "0"}, 400, "x-request-timeout-seconds"),
    ],
)
async def test_refused_before_any_work(serve, content, headers, status: int, param: str | None) -> None:
    server = serve()
    response = await server.chat(content, **headers)
    assert response.status_code == status
    assert error_of(response)["param"] == param
    assert server.model.jobs == []


async def test_a_body_that_hides_its_size_is_cut_off(serve) -> None:
    server, sent = serve(), 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield b"x" * 1000

    response = await server.client.post(CHAT, content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/docs", 404, "route_not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_routes_that_do_not_exist(serve, method: str, path: str, status: int, code: str) -> None:
    response = await serve().client.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert status != 405 or response.headers["allow"]


async def test_models(serve) -> None:
    client = serve().client
    listed = (await client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "tiny:off", "tiny:steered"]
    assert (await client.get("/v1/models/tiny:off")).json() == listed[1]


async def test_version_says_what_is_served(serve) -> None:
    version = (await serve().client.get("/version")).json()
    assert (version["version"], version["model"], version["artifact"]) == (VERSION, "tiny", "a" * 64)
    assert version["alignment"] == {"paired_overlap": 0.5}
    assert version["faithfulness"] == {"text_unexplained": 0.2}
    assert "/models" not in json.dumps(version), "no server paths"


def test_the_version_is_the_package_s() -> None:
    with open("pyproject.toml", encoding="utf-8") as project:
        assert f'version = "{VERSION}"' in project.read()


@pytest.mark.parametrize(
    ("health", "since_event", "status"),
    [
        (Health(alive=True, running=3, waiting=1, seconds_since_progress=1.0), float("inf"), 200),
        (Health(alive=True, running=3, waiting=1, seconds_since_progress=61.0), float("inf"), 503),
        (Health(alive=False, running=0, waiting=0, seconds_since_progress=0.0), 0.0, 503),
        (ApiError("engine_unavailable", "no answer"), float("inf"), 503),
        (ApiError("engine_unavailable", "too busy to answer, but tokens arrive"), 0.5, 200),
        (ApiError("engine_unavailable", "died a while after its last token"), 6.0, 503),
    ],
)
async def test_ready_means_progress(serve, health, since_event: float, status: int) -> None:
    server = serve()
    server.model.health, server.model.since_event = health, since_event
    assert (await server.client.get("/readyz")).status_code == status
    assert (await server.client.get("/healthz")).status_code == 200


async def test_readiness_is_looked_at_though_nobody_asks(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the application lives; a look that fails in an unforeseen way is not the last."""
    monkeypatch.setattr("service.http.api.LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("service.model.readiness.FRESH_S", 0.0)
    gauges = []
    monkeypatch.setattr("service.http.api.Metrics", lambda: gauges.append(Metrics()) or gauges[-1])
    server = serve()

    async def becomes(value: int) -> None:
        async with asyncio.timeout(5):
            while gauges[0].registry.get_sample_value("vlsae_ready") != value:
                await asyncio.sleep(0.01)

    async with server.api.router.lifespan_context(server.api):
        await becomes(1)
        server.model.health = ApiError("engine_unavailable", "stalled")
        await becomes(0)
        server.model.health = ScriptedModel().health
        await becomes(1)
        server.model.health = None  # not what a model says
        await becomes(0)
        server.model.health = ScriptedModel().health
        await becomes(1)


async def test_not_ready_has_its_code_in_the_log(serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="service")
    server = serve()
    server.model.health = ApiError("engine_unavailable", "no answer")
    assert (await server.client.get("/readyz")).status_code == 503
    (line,) = [record for record in caplog.records if record.name == "service.requests"]
    assert getattr(line, "facts")["error_code"] == "engine_unavailable"  # noqa: B009
    assert await server.metric('vlsae_rejections_total{arm="none",reason="engine_unavailable"}') == 0


class SlowModel(ScriptedModel):
    """Gives one token, then nothing until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.release = asyncio.Event()

    async def generate(self, job):
        try:
            async for event in ScriptedModel(delta(0, "a")).generate(job):
                yield event
            await self.release.wait()
            yield delta(0, "", finish="stop", tokens=0)
            yield end(1)
        finally:
            self.closed += 1


async def test_too_many_at_once_are_refused_and_places_are_given_back(serve) -> None:
    server = serve()
    model = SlowModel()
    server.api = build_api(SETTINGS, model, server.decoder)
    server.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=server.api), base_url="http://test")
    busy = [asyncio.create_task(server.chat()) for _ in range(2)]
    await asyncio.sleep(0.1)
    refused = await server.chat()
    assert (refused.status_code, error_of(refused)["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    busy[0].cancel()
    await asyncio.sleep(0.1)
    assert model.closed == 1, "a request that is cancelled closes its generation"
    model.release.set()
    assert (await server.chat()).status_code == 200
    assert (await busy[1]).status_code == 200
    assert await server.metric("vlsae_requests_in_progress") == 0
    assert (
        await server.metric('vlsae_requests_total{applied="unknown",arm="none",artifact="main",finish="cancelled"}')
        == 1
    )


@pytest.mark.parametrize("places", [0, 1])
async def test_how_long_a_refused_client_should_wait_is_estimated(serve, places: int, monkeypatch) -> None:
    """Whoever refuses it: the ingress that is full, or the queue before the model."""
    monkeypatch.setattr(LoadEstimate, "retry_after_s", lambda self: 16.2)
    settings = SETTINGS.model_copy(update={"max_concurrent_requests": places})
    refused = await serve(ApiError("overloaded", "the queue is full"), settings=settings).chat()
    assert (refused.status_code, error_of(refused)["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "17"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_has_a_time_limit(serve, stream: bool) -> None:
    server = serve()
    model = SlowModel()
    settings = SETTINGS.model_copy(update={"request_timeout_s": 2.0})
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app=build_api(settings, model, server.decoder)), base_url="http://test"
    )
    response = await client.post(CHAT, json=body(stream=stream))
    assert response.status_code == (200 if stream else 503)
    assert "request_timeout" in response.text
    assert model.closed == 1


LITTLE_MEMORY = SETTINGS.model_copy(update={"max_memory_bytes": 3 * 48 * 32 + 3000})


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (body(), 200),
        (body(user("x" * 3000)), 503),
        (body(user(image_part(), "what?")), 200),
        (body(user(image_part(), image_part(), "what?")), 503),
    ],
    ids=["a body that fits", "a body that does not", "pixels that fit", "pixels that do not"],
)
async def test_bodies_and_pixels_have_a_budget(serve, asked: dict, status: int) -> None:
    server = serve(settings=LITTLE_MEMORY)
    for _ in range(3):  # what a request took is given back
        response = await server.chat(asked)
        assert response.status_code == status
        if status == 503:
            assert error_of(response)["code"] == "overloaded"
            assert int(response.headers["retry-after"]) >= 1


async def test_pixels_are_held_until_the_answer_has_ended(serve) -> None:
    """As long as the engine's process keeps them."""
    server, asked, model = serve(settings=LITTLE_MEMORY), body(user(image_part(), "what?")), SlowModel()
    server.api = build_api(LITTLE_MEMORY, model, server.decoder)
    server.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=server.api), base_url="http://test")
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        first = group.create_task(server.chat(asked))
        while await server.metric("vlsae_requests_at_model") != 1 or await server.metric("vlsae_requests_waiting") != 0:
            await asyncio.sleep(0.01)
        assert (await server.chat(asked)).status_code == 503
        model.release.set()
    assert first.result().status_code == 200
    assert (await server.chat(asked)).status_code == 200


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"max_tokens": 40}, 503),
        ({"max_tokens": 40, "stream": True}, 200),
        ({"max_tokens": 40, "top_logprobs": None, "logprobs": False}, 200),
        ({"max_tokens": 60, "top_logprobs": 0}, 503),
        ({"max_tokens": 4, "n": 4}, 503),
        ({"max_tokens": 4}, 200),
    ],
)
async def test_what_is_kept_of_an_answer_until_it_is_whole_counts(serve, changes: dict, status: int) -> None:
    server = serve(delta(0, "a", logprobs=True), delta(0, "", finish="stop", tokens=0), end(1), settings=LITTLE_MEMORY)
    server.model.events *= 2 if changes.get("n") else 1
    asked = body(user("what?"), logprobs=True, top_logprobs=4) | changes
    for _ in range(2):  # and is given back
        assert (await server.chat(asked)).status_code == status


@pytest.mark.parametrize("text", ["x" * 1200 + "\U0001f600", "x" * 1200 + "é"])
async def test_a_text_that_takes_more_memory_than_bytes_counts_so(serve, text: str) -> None:
    server = serve(settings=LITTLE_MEMORY)
    assert (await server.chat(body(user("x" * 1200)))).status_code == 200
    for ascii_only in (True, False):
        raw = json.dumps(body(user(text)), ensure_ascii=ascii_only).encode()
        assert (await server.chat(raw)).status_code == 503


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_failure(serve, caplog) -> None:
    server = serve()
    for path in (CHAT, "/v1/feedback"):
        pieces = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
        sent = []

        async def receive(pieces=pieces) -> dict:
            return next(pieces)

        async def send(message: dict, sent=sent) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"test")]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
                 "headers": headers, "state": {}}  # fmt: skip
        await server.api(scope, receive, send)
        assert sent == []
    assert await server.metric('vlsae_rejections_total{arm="none",reason="internal_error"}') in (None, 0.0)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.0.7", 200),
        ("LOCALHOST:8000", 200),
        ("model.localhost", 200),
        ("pages.example", 400),
        ("pages.example:8000", 400),
        ("localhost.pages.example", 400),
        ("127.0.0.1.pages.example", 400),
        ("", 400),
    ],
)
async def test_a_page_whose_name_leads_here_gets_nothing(serve, host: str, status: int) -> None:
    server = serve(settings=SETTINGS.model_copy(update={"only_local_names": True}))
    response = await server.chat(host=host)
    assert response.status_code == status
    if status == 400:
        assert (error_of(response)["code"], error_of(response)["param"]) == ("invalid_header", "host")


@pytest.mark.parametrize("model_id", ["other", "a/b", "%0A9", "9%0A", "%00", "%FF", "%2E%2E"])
async def test_a_model_that_is_not_there_is_a_404_that_the_document_knows(serve, model_id: str) -> None:
    server = serve()
    response = await server.client.get(f"/v1/models/{model_id}")
    assert response.status_code == 404
    schema = build_openapi(SETTINGS, with_keys=False)["paths"]["/v1/models/{model_id}"]["get"]["responses"]["404"]
    assert f'"{error_of(response)["code"]}"' in json.dumps(schema)
