"""Every answer has one request id, and every request one line in the log and one count."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from service.errors import ApiError
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.settings import Settings
from tests.service.examples import ScriptedModel, body, delta, image_part, user

SETTINGS = Settings(model="/models/tiny", artifact="/a", allow_anonymous=True)
CHAT = "/v1/chat/completions"
OURS = "abc.DEF:1_2-3"


class Endless(ScriptedModel):
    """One token, and then nothing for ever."""

    async def generate(self, job):
        async for event in ScriptedModel(delta(0, "a")).generate(job):
            yield event
        await asyncio.Event().wait()


@pytest.fixture
async def clients() -> AsyncIterator:
    """Makes a client of a service whose model says these events."""
    opened = []
    decoder = ImageDecoder(workers=1, limits=DecoderLimits(max_side=999))

    def client(*events, model: ScriptedModel | None = None, proxied: bool = False) -> httpx.AsyncClient:
        api = build_api(SETTINGS, model or ScriptedModel(*events), decoder, proxied=proxied)
        transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
        opened.append(httpx.AsyncClient(transport=transport, base_url="http://test"))
        return opened[-1]

    yield client
    for one in opened:
        await one.aclose()
    decoder.close()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture):
    """The facts of all requests logged so far."""
    caplog.set_level(logging.INFO, logger="service")
    return lambda: [getattr(one, "facts") for one in caplog.records if one.name == "service.requests"]  # noqa: B009


async def test_a_request_id_is_taken_or_made_and_returned_once(clients, told) -> None:
    client = clients()
    given = await client.post(CHAT, json=body(), headers={"x-request-id": OURS})
    made = await client.post(CHAT, json=body())
    assert given.headers.get_list("x-request-id") == [OURS]
    (new,) = made.headers.get_list("x-request-id")
    assert len(new) == 32
    assert [facts["request_id"] for facts in told()] == [OURS, new]


@pytest.mark.parametrize(
    ("method", "path", "send", "status"),
    [
        ("POST", CHAT, {"json": {}}, 400),
        ("POST", CHAT, {"content": b"x"}, 415),
        ("POST", CHAT, {"json": body(model="other")}, 404),
        ("GET", "/nowhere", {}, 404),
        ("GET", CHAT, {}, 405),
        ("GET", "/readyz", {"headers": {"x-request-timeout-seconds": "1"}}, 400),
        ("PROPFIND", "/nowhere", {}, 404),
    ],
)
async def test_errors_have_one_too(clients, told, method: str, path: str, send: dict, status: int) -> None:
    response = await clients().request(method, path, **send)
    assert response.status_code == status
    assert len(response.headers.get_list("x-request-id")) == 1
    (facts,) = told()
    assert (facts["status"], facts["error_code"]) == (status, response.json()["error"]["code"])
    assert facts["route"] in (CHAT, "/readyz", "unknown")
    assert facts["method"] in ("GET", "POST", "other")


async def test_one_that_is_not_accepted_is_neither_returned_nor_logged(clients, told) -> None:
    response = await clients().post(CHAT, json=body(), headers={"x-request-id": "a b"})
    assert response.status_code == 400
    (new,) = response.headers.get_list("x-request-id")
    assert len(new) == 32
    assert told()[0]["request_id"] == new


async def test_behind_serve_s_proxy_the_proxy_returns_it(clients, told) -> None:
    response = await clients(proxied=True).post(CHAT, json=body(), headers={"x-request-id": OURS})
    assert "x-request-id" not in response.headers
    assert told()[0]["request_id"] == OURS


async def test_what_the_log_knows_of_an_answer(clients, told) -> None:
    ask = body(user(image_part(), "what?"), stream=True)
    await clients().post(CHAT, json=ask)
    (facts,) = told()
    assert facts.pop("completion_id").startswith("chatcmpl-")
    assert facts.pop("duration_s") >= facts.pop("time_to_first_token_s") > 0
    assert len(facts.pop("request_id")) == 32
    assert facts == {
        "method": "POST", "route": CHAT, "status": 200, "stream": True, "finish": "stop", "prompt_tokens": 20,
        "completion_tokens": 3, "images": 1, "image_pixels": 48 * 32, "artifact": "main",
        "steering": {"artifact": "a" * 64, "applied": True, "reason": None, "preset": "captions", "strength": 1.0,
                     "arm": None, "relative_shift": 0.25, "mismatch": 0.5},
        "choices": 1, "empty_choices": 0,
    }  # fmt: skip


async def test_a_stream_that_breaks_is_logged_with_its_error(clients, told) -> None:
    client = clients(delta(0, "a"), ApiError("engine_unavailable", "lost"))
    await client.post(CHAT, json=body(stream=True))
    (facts,) = told()
    assert (facts["status"], facts["error_code"], facts["finish"]) == (200, "engine_unavailable", "error")
    metrics = (await client.get("/metrics")).text
    assert 'vlsae_rejections_total{arm="none",reason="engine_unavailable"} 1.0' in metrics
    assert f'vlsae_http_responses_total{{route="{CHAT}",status="200"}} 1.0' in metrics


async def test_a_client_that_leaves_is_logged(clients, told) -> None:
    client = clients(model=Endless())
    asking = asyncio.create_task(client.post(CHAT, json=body()))
    while 'vlsae_time_to_first_token_seconds_count{arm="none"} 1.0' not in (await client.get("/metrics")).text:
        await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    (facts,) = told()
    assert facts["finish"] == "cancelled"
    assert facts["completion_tokens"] == 1
    assert "status" not in facts
    assert f'vlsae_http_responses_total{{route="{CHAT}",status="none"}} 1.0' in (await client.get("/metrics")).text


async def test_waiting_is_from_the_model_s_door_to_the_first_token(clients) -> None:
    class Silent(ScriptedModel):
        async def generate(self, job):
            await release.wait()
            async for event in ScriptedModel().generate(job):
                yield event

    async def waiting() -> str:
        text = (await client.get("/metrics")).text
        return next(line for line in text.splitlines() if line.startswith("vlsae_requests_waiting"))

    release, client = asyncio.Event(), clients(model=Silent())
    asking = asyncio.create_task(client.post(CHAT, json=body()))
    while await waiting() != "vlsae_requests_waiting 1.0":
        await asyncio.sleep(0.01)
    release.set()
    await asking
    assert await waiting() == "vlsae_requests_waiting 0.0"


async def test_what_a_secret_touches(clients, told, caplog: pytest.LogCaptureFixture) -> None:
    """An exception that quotes the prompt: in the answer and in the log there is nothing of it."""
    client = clients(ValueError("the prompt was: a secret"))
    response = await client.post(CHAT, json=body(user("a secret")))
    assert response.status_code == 500
    assert "secret" not in response.text
    assert told()[0]["error_code"] == "internal_error"
    assert "secret" not in "".join(record.getMessage() for record in caplog.records)
