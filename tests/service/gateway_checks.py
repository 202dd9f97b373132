"""Is a limit of the gateway in force? For each one a client that it should stop, on a socket, and what it must see."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from tests.service.gateways import TOKEN, TOKENS, Backend

PATIENCE_S = 20.0
SOON_S = 1.5
"""A limit of .3 s has struck by then."""
BODY_BYTES = 100_000
ROOM_BYTES = 1024 * 1024 + 200_000
"""What goes on beyond a body's limit: the Lua filter's room, and buffers."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


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


async def token_delay(port: int, backend: Backend) -> bool:
    """Ten tokens, each sent when the one before is there: held for 200 ms each, they take two seconds. A busy machine
    may be slow, too, but not three times."""
    for _ in range(3):
        async with connected(port, head("/tokens", "content-length: 0")) as (reader, _writer):
            began = time.monotonic()
            for _ in range(TOKENS):
                backend.wanted.release()
                await reader.readuntil(TOKEN)
            if time.monotonic() - began < SOON_S:
                return True
    return False


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
    "token-delay": (token_delay, {}),
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
