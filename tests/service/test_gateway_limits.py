"""What the gateway's configuration stops, answers and lets through. Each limit taken out of it lets something through.

HAProxy itself, in front of something that has no limits.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.errors import ERROR_KINDS, ApiError
from service.gateway import CONFIGURATION
from service.http.middleware import GATEWAY_HEADER
from service.settings import Settings
from tests.service.gateway_checks import CHECKS, PATIENCE_S, SOON_S, ask, connected, head, seen, status_of, until
from tests.service.gateways import Backend, limits, running_backend, running_gateway, without

SHORT: dict[str, Any] = {"HEAD_TIMEOUT": "300ms", "IDLE_TIMEOUT": "300ms", "LOOKUP_TIMEOUT": "300ms"}
WAITED_FOR = ("idle-time", "idle-body", "head-time", "lookup-time", "body-size", "chunked-body-size",
              "token-delay")  # fmt: skip
PLAIN_CODES = {404: "engine_unavailable", 408: "request_timeout", 429: "overloaded", 503: "overloaded",
               500: "engine_unavailable"}  # fmt: skip
"""Serve's own status to the code that clients see."""


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    async with running_backend() as running:
        yield running


@pytest.fixture
async def gateway(backend: Backend) -> AsyncIterator[int]:
    with running_gateway(backend.port, **SHORT) as port:
        yield port


@pytest.mark.parametrize(
    "limit", [pytest.param(limit, marks=pytest.mark.slow) if limit in WAITED_FOR else limit for limit in CHECKS]
)
async def test_a_limit_is_in_force_and_without_its_lines_it_is_not(
    backend: Backend, tmp_path: Path, limit: str
) -> None:
    in_force, values = CHECKS[limit]
    with running_gateway(backend.port, **values) as port:
        assert await in_force(port, backend)
    backend.left.clear()
    with running_gateway(backend.port, without(limit, tmp_path), **values) as port:
        assert not await in_force(port, backend)


def test_every_limit_is_tried() -> None:
    assert set(CHECKS) == set(limits())


RETURNED = re.compile(r"(?:http-error|return) status (\d{3}) content-type application/json (.*?)string '([^']+)'")


def test_what_the_gateway_says_is_what_the_service_would() -> None:
    """In shape, status, type and headers; 502 and 504, which only HAProxy says, leave as 503."""
    text = CONFIGURATION.read_text()
    said = RETURNED.findall(text)
    assert len(said) == text.count("string '") == len(re.findall(r"http-error |(?:request|response) return ", text))
    for status, headers, content in said:
        error = json.loads(content)["error"]
        expected = ApiError(error["code"], error["message"], param=error["param"])
        assert {"error": error} == expected.body()
        assert ERROR_KINDS[error["code"]].status == {502: 503, 504: 503}.get(int(status), int(status))
        named = {name.lower() for name in expected.headers()}
        assert named <= set(re.findall(r"hdr (\S+)", headers)) <= named | {"allow"}


def test_its_values_are_the_service_s_defaults() -> None:
    values = dict(re.findall(r"presetenv GATEWAY_(\S+) (\S+)", CONFIGURATION.read_text()))
    settings = Settings()
    assert int(values["MAX_BODY_BYTES"]) == settings.max_body_bytes
    assert float(values["IDLE_TIMEOUT"].removesuffix("s")) > settings.body_timeout_s
    assert float(values["ANSWER_TIMEOUT"].removesuffix("s")) > settings.request_timeout_s


@pytest.mark.parametrize("path", [*map(str, PLAIN_CODES), "lost"])
async def test_serve_s_own_answers_become_openai_s(gateway: int, path: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway}") as client:
        answer = await client.post(f"/{path}", headers={"x-request-id": "mine"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, PLAIN_CODES.get(int(path) if path.isdigit() else 500))
    assert "retry-after" in answer.headers
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert "Ping" not in answer.text


async def test_nobody_behind_it_is_an_answer_too() -> None:
    with running_gateway(1) as port:
        answer = await asyncio.to_thread(httpx.post, f"http://127.0.0.1:{port}/a", timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")


async def test_a_request_has_one_id_from_here_on_and_says_whence_it_comes(gateway: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway}") as client:
        for given in ({}, {"x-request-id": "mine", GATEWAY_HEADER: "off"}):
            answer = await client.get("/a", headers=given)
            there = answer.json()["headers"]
            (id_there,) = [value for name, value in there if name == "x-request-id"]
            assert answer.headers.get_list("x-request-id") == [id_there]
            assert id_there == given.get("x-request-id", id_there)
            assert [value for name, value in there if name == GATEWAY_HEADER] == ["on"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/silent", "/paused"])
@pytest.mark.parametrize("besides", [b"", head("/b", method="GET")], ids=["", "and asks again"])
async def test_who_waits_may_and_who_hangs_up_is_missed(
    gateway: int, backend: Backend, path: str, besides: bytes
) -> None:
    async with connected(gateway, head(path, "content-length: 0") + besides):
        await asyncio.sleep(SOON_S)  # longer than a client may be idle that has something to send or to take
        assert backend.left == []
    assert await until(lambda: backend.left == [path])


async def test_a_stream_that_is_cut_is_not_taken_for_complete(gateway: int) -> None:
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(f"http://127.0.0.1:{gateway}/cut")


async def test_a_chunked_body_is_as_good_as_any(gateway: int, backend: Backend) -> None:
    chunks = (b"4000\r\n" + bytes(0x4000) + b"\r\n") * 100 + b"0\r\n\r\n"
    assert await ask(gateway, head("/a", "transfer-encoding: chunked") + chunks) == 200
    assert backend.taken_bytes >= 100 * 0x4000


async def test_of_two_lengths_one_goes_on_and_nothing_behind_it(gateway: int) -> None:
    """As HTTP says where both stand there: the chunks count, and the connection ends."""
    both = head("/a", "transfer-encoding: chunked", "content-length: 5") + b"2\r\n{}\r\n0\r\n\r\n"
    assert "content-length" not in await seen(gateway, both)
    async with connected(gateway, both + head("/b", method="GET")) as (reader, _):
        assert (await reader.read()).count(b"HTTP/1.1 ") == 1


async def test_who_is_refused_cannot_go_on_sending(gateway: int) -> None:
    async with connected(gateway, head("/a", f"content-length: {10**12}")) as (reader, writer):
        assert await status_of(reader) == 413
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionError):
                while not writer.is_closing():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.01)
