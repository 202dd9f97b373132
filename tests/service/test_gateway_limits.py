"""What the gateway's configuration stops, answers and lets through. Each limit taken out of it lets something through.

HAProxy itself, in front of something that has no limits.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.errors import ERROR_KINDS, ApiError
from service.gateway import CONFIGURATION
from service.http.request_guard import GATEWAY_HEADER
from service.settings import Settings
from tests.service.gateways import Backend, limits, running_backend, running_gateway, without

PATIENCE_S = 20.0
SOON_S = 1.5
"""A limit of .3 s has struck by then."""
SHORT: dict[str, Any] = {"HEAD_TIMEOUT": "300ms", "IDLE_TIMEOUT": "300ms", "LOOKUP_TIMEOUT": "300ms"}
BODY_BYTES = 100_000
ROOM_BYTES = 1024 * 1024 + 200_000
"""What goes on beyond a body's limit: the Lua filter's room, and buffers."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PLAIN_CODES = {404: "engine_unavailable", 408: "request_timeout", 429: "overloaded", 503: "overloaded",
               500: "engine_unavailable"}  # fmt: skip
"""Serve's own status to the code that clients see."""


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: a", *headers, "", ""]).encode("latin-1")


@asynccontextmanager
async def connected(port: int, data: bytes = b"") -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    writer.write(data)
    try:
        yield reader, writer
    finally:
        writer.close()


async def status_of(reader: asyncio.StreamReader, within_s: float = PATIENCE_S) -> int:
    """Of the next answer; 0 where the connection ends without one, -1 where nothing comes in time."""
    try:
        async with asyncio.timeout(within_s):
            line = await reader.readline()
    except ConnectionError:
        return 0
    except TimeoutError:
        return -1
    return int(line.split()[1]) if line else 0


async def ask(port: int, data: bytes, within_s: float = PATIENCE_S) -> int:
    async with connected(port, data) as (reader, _):
        return await status_of(reader, within_s)


async def seen(port: int, data: bytes) -> dict[str, str]:
    """The headers that arrive behind the gateway."""
    async with connected(port, data) as (reader, _):
        await reader.readuntil(b"\r\n\r\n")
        return dict(json.loads((await reader.readuntil(b"}")).partition(b"\r\n")[2])["headers"])


async def until(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return condition()


async def head_size(port: int, _backend: Backend) -> bool:
    sizes = [await ask(port, head("/a", "x-a: " + "b" * size)) for size in (60_000, 70_000)]
    lines = [await ask(port, head("/a", *["x-a: b"] * count)) for count in (90, 200)]
    return (sizes, lines) == ([200, 400], [200, 400])


async def head_time(port: int, _backend: Backend) -> bool:
    """A head that goes on coming, never idle."""
    async with connected(port, b"POST / HTTP/1.1\r\nx-a: ") as (reader, writer):
        status = asyncio.create_task(status_of(reader, SOON_S))
        while not status.done():
            writer.write(b"b")
            await asyncio.sleep(0.05)
        return await status == 408


async def idle_time(port: int, backend: Backend) -> bool:
    """Half a body, and an answer that nobody takes."""
    half = await ask(port, head("/a", "content-length: 9") + b"x", SOON_S)
    async with connected(port, head("/endless", "content-length: 0")) as (_, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        gone = await until(lambda: "/endless" in backend.left, SOON_S)
    return half == 400 and gone


async def source_connections(port: int, _backend: Backend) -> bool:
    """Of eight four are kept; or three, as long as the one that asked whether it listens counts, too."""
    statuses = []
    async with AsyncExitStack() as kept:
        for _ in range(8):
            try:
                reader, _writer = await kept.enter_async_context(connected(port, head("/a", method="GET")))
                statuses.append(await status_of(reader))
            except ConnectionError:
                statuses.append(0)
    return set(statuses) == {0, 200} and statuses.count(200) in (3, 4)


async def source_rate(port: int, _backend: Backend) -> bool:
    return [await ask(port, head("/a", method="GET")) for _ in range(40)][-1] == 429


async def connections(port: int, _backend: Backend) -> bool:
    """Of 32, of which the last two are refused."""
    kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
    await asyncio.sleep(0.2)
    refused = await ask(port, head("/a", method="GET"))
    for _, writer in kept:
        writer.close()
    return refused == 503


async def request_id(port: int, _backend: Backend) -> bool:
    wrong = (["x-request-id: a b"], ["x-request-id: \xff"], ["x-request-id: " + "a" * 129], ["x-request-id: a"] * 2)
    return [await ask(port, head("/a", *headers)) for headers in wrong] == [400] * 4


async def methods(port: int, _backend: Backend) -> bool:
    return [await ask(port, head("/a", method=method)) for method in ("TRACE", "CHAT", "post")] == [405] * 3


async def paths(port: int, _backend: Backend) -> bool:
    hidden = ("/-/routes", "/-/routes?a=b", "/%2d/routes", "/-%2Froutes", "/-/anything", "http://a/-/routes")
    statuses = [await ask(port, head(path, method="GET")) for path in (*hidden, "/-/healthz")]
    return [*statuses, await ask(port, head("*", method="OPTIONS"))] == [404] * 6 + [200, 404]


async def serve_orders(port: int, _backend: Backend) -> bool:
    names = ("X-Request-Disconnect-Disabled: ?1", "x-request-timeout-seconds: \xff")
    return [await ask(port, head("/a", name)) for name in names] == [400, 400]


async def serve_headers(port: int, _backend: Backend) -> bool:
    names = ("x-session-id", "X_Session_Id", "serve_multiplexed_model_id", "Serve-Multiplexed-Model-Id",
             "x_request_timeout_seconds")  # fmt: skip
    there = await seen(port, head("/a", *(f"{name}: b" for name in names)))
    return not {name.lower() for name in names} & set(there)


async def upgrades(port: int, _backend: Backend) -> bool:
    key = "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="
    asked = ("connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13", key)
    try:
        return "upgrade" not in await seen(port, head("/a", *asked, method="GET"))
    except (asyncio.IncompleteReadError, ValueError):  # it is no HTTP any more
        return False


async def forwarded(port: int, _backend: Backend) -> bool:
    names = ("x-forwarded-for", "x-forwarded-proto", "forwarded")
    return not set(names) & set(await seen(port, head("/a", *(f"{name}: b" for name in names))))


async def body_size(port: int, _backend: Backend) -> bool:
    sizes = (BODY_BYTES + 1, 10**12)
    return [await ask(port, head("/silent", f"content-length: {size}"), SOON_S) for size in sizes] == [413, 413]


async def chunked_body_size(port: int, backend: Backend) -> bool:
    """Nobody answers, and the client goes on."""
    backend.taken_bytes = 0
    chunk = b"4000\r\n" + bytes(0x4000) + b"\r\n"

    async def go_on(writer: asyncio.StreamWriter) -> None:
        while backend.taken_bytes < 2 * ROOM_BYTES:
            writer.write(chunk)
            await writer.drain()

    async with connected(port, head("/silent", "transfer-encoding: chunked")) as (_, writer):
        with suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(go_on(writer), SOON_S)
        return BODY_BYTES < backend.taken_bytes < BODY_BYTES + ROOM_BYTES


async def idle_body(port: int, _backend: Backend) -> bool:
    bodies = ("content-length: 20000", "transfer-encoding: chunked")
    return [await ask(port, head("/silent", one, method="GET"), SOON_S) for one in bodies] == [413, 413]


async def lookup_time(port: int, _backend: Backend) -> bool:
    return await ask(port, head("/silent", method="HEAD"), SOON_S) == 503


Check = Callable[[int, Backend], Awaitable[bool]]
CHECKS: dict[str, tuple[Check, dict[str, Any]]] = {
    "head-size": (head_size, {}),
    "head-time": (head_time, {"HEAD_TIMEOUT": "300ms"}),
    "idle-time": (idle_time, {"IDLE_TIMEOUT": "300ms"}),
    "source-connections": (source_connections, {"SOURCE_CONNECTIONS": 4}),
    "source-rate": (source_rate, {"SOURCE_REQUESTS": 30}),
    "connections": (connections, {"MAX_CONNECTIONS": 32}),
    "request-id": (request_id, {}),
    "methods": (methods, {}),
    "paths": (paths, {}),
    "serve-orders": (serve_orders, {}),
    "serve-headers": (serve_headers, {}),
    "upgrades": (upgrades, {}),
    "forwarded": (forwarded, {}),
    "body-size": (body_size, {"MAX_BODY_BYTES": BODY_BYTES}),
    "chunked-body-size": (chunked_body_size, {"MAX_BODY_BYTES": BODY_BYTES}),
    "idle-body": (idle_body, {}),
    "lookup-time": (lookup_time, {"LOOKUP_TIMEOUT": "300ms"}),
}
"""Limit to whether it is in force, and the values with which that is seen at once."""


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    async with running_backend() as running:
        yield running


@pytest.fixture
async def gateway(backend: Backend) -> AsyncIterator[int]:
    with running_gateway(backend.port, **SHORT) as port:
        yield port


@pytest.mark.parametrize("limit", CHECKS)
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
