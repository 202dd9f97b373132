"""What a connection may send before it has asked anything, on real sockets under a real uvicorn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import pytest
import uvicorn
import uvicorn.config
from starlette.types import Receive, Scope, Send

from service.http.http_connection import (
    HEAD_TIMEOUT_S,
    MAX_HEAD_BYTES,
    BoundedConnection,
    bound_connections,
)

ASK = b"GET / HTTP/1.1\r\nhost: a\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


MUCH = b"m" * 20_000_000
"""More than the kernel keeps for a client that reads nothing."""


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] in ("/much", "/much-and-close"):
        await send_much(send, closes=scope["path"] == "/much-and-close")
        return
    if scope["path"] == "/until-left":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    if scope["path"] == "/asked":
        while (await receive()).get("more_body"):
            pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    if scope["path"] == "/slow":
        await asyncio.sleep(0.6)
    if scope["path"] == "/body":
        while (await receive()).get("more_body"):
            pass
    await send({"type": "http.response.body", "body": b"hello"})


async def send_much(send: Send, *, closes: bool) -> None:
    headers = [(b"content-length", b"%d" % (len(MUCH) if closes else len(MUCH) + 1))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": MUCH, "more_body": not closes})
    if not closes:
        await send({"type": "http.response.body", "body": b"m"})


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[uvicorn.Server]:
    """Patient for .3 s; it runs what `auto` has become."""
    monkeypatch.setattr(BoundedConnection, "head_timeout_s", 0.3)
    monkeypatch.setattr(BoundedConnection, "take_timeout_s", 0.3)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "h11")
    bound_connections()
    server = uvicorn.Server(uvicorn.Config(hello, port=0, lifespan="off", log_level="critical"))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server
    server.should_exit = server.force_exit = True
    await running


@pytest.fixture
def connect(server: uvicorn.Server) -> Callable[[], Awaitable[Connection]]:
    """Opens connections to it."""
    port = server.servers[0].sockets[0].getsockname()[1]
    return lambda: asyncio.open_connection("127.0.0.1", port)


async def answer_to(connection: Connection, *pieces: bytes) -> bytes:
    """All that comes back until the server hangs up or has said hello."""
    reader, writer = connection
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.01)
    answer = b""
    while not answer.endswith(b"\r\n\r\nhello") and (piece := await reader.read(65_536)):
        answer += piece
    return answer


async def test_a_connection_is_kept_for_more_than_one_request(connect) -> None:
    connection = await connect()
    for _ in range(3):
        assert (await answer_to(connection, ASK + b"\r\n")).startswith(b"HTTP/1.1 200")
    connection[1].close()


async def test_a_head_may_come_in_pieces(connect) -> None:
    connection = await connect()
    pieces = (ASK, b"x-a: ", b"b" * (MAX_HEAD_BYTES - 100), b"\r\n", b"\r\n")
    assert (await answer_to(connection, *pieces)).startswith(b"HTTP/1.1 200")
    connection[1].close()


@pytest.mark.parametrize(
    "pieces",
    [
        (ASK + b"x-a: " + b"b" * MAX_HEAD_BYTES + b"\r\n\r\n",),
        (ASK + b"x-a: ", *[b"b" * 10_000] * 7),
        (ASK + b"x-a: b\r\n" * 10_000 + b"\r\n",),
        (b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nhost: a\r\n\r\n",),
        (b"hello\r\n\r\n",),
    ],
    ids=["a header", "a header in pieces", "many headers", "a path", "not HTTP"],
)
async def test_a_head_that_is_refused(connect, pieces: tuple[bytes, ...]) -> None:
    answer = await answer_to(await connect(), *pieces)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in head
    error = json.loads(content)["error"]
    assert (error["code"], str(MAX_HEAD_BYTES) in error["message"]) == ("invalid_header", True)


@pytest.mark.parametrize("pieces", [(), (b"GE",), (ASK,), (ASK + b"\r\n", b"GET")], ids=["", "word", "half", "second"])
async def test_a_head_that_does_not_come_is_not_waited_for(connect, pieces: tuple[bytes, ...]) -> None:
    reader, writer = await connect()
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.05)
    async with asyncio.timeout(HEAD_TIMEOUT_S / 2):
        await reader.read()


CHUNKED = b"POST /asked HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((b"5\r\nhello\r\n0\r\nx-a: b\r\n\r\n",), b"200"),
        ((b"20000\r\n", *[b"b" * 0x2000] * 16, b"\r\n0\r\n\r\n"), b"200"),
        ((b"5\r\nhello\r\n0\r\nx-a: ", *[b"b" * 10_000] * 8), b"400"),
        ((b"5\r\nhello\r\n0\r\n" + b"x-a: b\r\n" * 10_000,), b"400"),
        ((b"5;", *[b"b" * 10_000] * 8), b"400"),
    ],
    ids=["a trailer", "a body", "a trailer in pieces", "many trailers", "a chunk's extension"],
)
async def test_what_follows_a_body_is_bounded_too(connect, pieces: tuple[bytes, ...], status: bytes) -> None:
    answer = await answer_to(await connect(), CHUNKED, *pieces)
    assert answer.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("path", [b"/", b"/slow"])
async def test_a_second_request_before_the_answer_is_not_answered(connect, path: bytes) -> None:
    reader, writer = await connect()
    ask = b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n" % path
    writer.write(ask * 3)
    async with asyncio.timeout(HEAD_TIMEOUT_S / 2):
        answer = await reader.read()
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.endswith(b"\r\n\r\nhello")
    assert b"connection: close" in answer
    writer.close()


async def test_who_leaves_is_missed_whatever_it_has_sent_besides(connect, server: uvicorn.Server) -> None:
    _, writer = await connect()
    writer.write(b"GET /until-left HTTP/1.1\r\nhost: a\r\n\r\n" + (ASK + b"\r\n") * 2)
    while not server.server_state.tasks:
        await asyncio.sleep(0.01)
    writer.write((ASK + b"\r\n") * 5000)
    await asyncio.sleep(0.05)
    writer.close()
    async with asyncio.timeout(HEAD_TIMEOUT_S / 2):
        while server.server_state.tasks:
            await asyncio.sleep(0.01)


async def test_only_so_many_connections(connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedConnection, "max_connections", 2)
    monkeypatch.setattr(BoundedConnection, "head_timeout_s", 60)
    kept = [await connect() for _ in range(2)]
    for connection in kept:
        assert b"HTTP/1.1 200" in await answer_to(connection, ASK + b"\r\n")
    head, _, content = (await answer_to(await connect())).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    assert b"Retry-After: 1" in head
    assert json.loads(content)["error"]["code"] == "overloaded"
    kept.pop()[1].close()
    await asyncio.sleep(0.1)
    assert b"HTTP/1.1 200" in await answer_to(await connect(), ASK + b"\r\n")


async def test_a_websocket_is_a_request_like_any_other(connect) -> None:
    upgrade = (
        b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: YQ==\r\n\r\n"
    )
    assert (await answer_to(await connect(), ASK + upgrade)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("head", [b"GET /much HTTP/1.1\r\nhost: a\r\n\r\n",
                                  b"GET /much-and-close HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"],
                         ids=["open", "closed"])  # fmt: skip
async def test_an_answer_that_is_not_taken_is_thrown_away(server: uvicorn.Server, connect, head: bytes) -> None:
    _, writer = await connect()
    writer.transport.pause_reading()
    while not server.server_state.connections:
        await asyncio.sleep(0.01)
    if b"close" in head:  # alone: writing is never paused
        (connection,) = server.server_state.connections
        connection.transport.set_write_buffer_limits(high=2 * len(MUCH))  # type: ignore[union-attr]
    writer.write(head)
    while not server.server_state.total_requests and not server.server_state.tasks:
        await asyncio.sleep(0.01)
    async with asyncio.timeout(HEAD_TIMEOUT_S / 2):
        while server.server_state.connections or server.server_state.tasks:
            await asyncio.sleep(0.01)
    writer.close()


async def test_an_answer_of_which_too_little_is_taken_is_thrown_away(
    server: uvicorn.Server, connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though something is, all the time."""
    monkeypatch.setattr(BoundedConnection, "take_timeout_s", 2.0)
    monkeypatch.setattr("service.http.http_connection.TAKEN_SHARE", 0.5)
    reader, writer = await connect()
    (connection,) = server.server_state.connections
    connection.transport.set_write_buffer_limits(high=2 * len(MUCH))  # type: ignore[union-attr]
    writer.write(b"GET /much-and-close HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    taken = 0
    async with asyncio.timeout(HEAD_TIMEOUT_S):
        while server.server_state.connections:
            taken += len(await reader.read(131_072))
            await asyncio.sleep(0.06)
    with suppress(ConnectionError):
        taken += len(await reader.read())
    assert 100_000 < taken < len(MUCH)
    writer.close()


async def test_an_answer_that_is_taken_slowly_comes_whole(connect) -> None:
    reader, writer = await connect()
    writer.write(b"GET /much-and-close HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    size = 0
    while piece := await reader.read(2_000_000):
        size += len(piece)
        if len(piece) > 100_000:
            await asyncio.sleep(0.005)
    assert size > len(MUCH)


SLOW = b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n"


async def test_an_empty_line_is_no_request(connect, server: uvicorn.Server) -> None:
    server.config.timeout_keep_alive = 60
    connection = await connect()
    await answer_to(connection, ASK + b"\r\n")
    connection[1].write(b"\r\n")
    async with asyncio.timeout(HEAD_TIMEOUT_S / 2):
        assert await connection[0].read() == b""


@pytest.mark.parametrize("second", [b"hello\r\n\r\n", ASK + b"x-a: " + b"b" * MAX_HEAD_BYTES + b"\r\n\r\n"])
async def test_nothing_is_written_into_an_answer_on_its_way(connect, second: bytes) -> None:
    reader, writer = await connect()
    for piece in (SLOW, second):
        writer.write(piece)
        await asyncio.sleep(0.05)
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n\r\nhello")
    assert answer.count(b"HTTP/1.1") == 1


async def test_a_half_sent_request_does_not_cut_the_answer_before_it(connect) -> None:
    connection = await connect()
    assert (await answer_to(connection, SLOW, ASK)).endswith(b"\r\n\r\nhello")
    assert await connection[0].read() == b""
