"""What clients see of Serve's own answers, lost replicas, their own slowness and their own haste. Real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import pytest
import uvicorn
from ray.serve._private.http_util import RequestIdMiddleware, convert_object_to_asgi_messages
from starlette.types import Message, Receive, Scope, Send

from service.http.edge_exchange import refusal
from service.http.proxy_edge import LIMITS, MAX_IDLE_BODY_BYTES, ProxyEdge, middlewares
from service.metrics.meter import Metrics
from service.settings import Settings

TIMEOUT_S = 0.5
GET_TIMEOUT_S = 2.0
LIMIT = 200_000
MEMORY = LIMIT + 50_000
LARGE = LIMIT
"""Bytes of each half of the answer to `large`."""
PIECE = b"x" * 1_000_000
DISCONNECTED: list[str] = []
TAKEN: dict[str, int] = {}
"""Method to the bytes that the application was handed."""
ENDED: list[str] = []
"""Paths whose requests are over, their counting included."""


async def serve_like(scope: Scope, receive: Receive, send: Send) -> None:
    """By path: how Serve's proxy behaves in the cases it does not answer well."""
    path = scope["path"].rpartition("/")[2]
    if path.isdigit():
        for message in convert_object_to_asgi_messages("Path '/' not found. Ping ...", status_code=int(path)):
            await send(message)
    elif path in ("stream", "json", "metrics"):
        kind = {"stream": b"text/event-stream; charset=utf-8", "json": b"application/json", "metrics": b"text/plain"}
        headers = [(b"content-type", kind[path])]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": path != "metrics"})
    elif path == "silent":
        while (await receive())["type"] != "http.disconnect":
            pass
        for message in convert_object_to_asgi_messages("Client disconnected", status_code=499):
            await send(message)
    elif path == "endless":
        await endless(receive, send)
    elif path == "greedy":
        TAKEN.setdefault(scope["method"], 0)
        while (message := await receive())["type"] != "http.disconnect":
            TAKEN[scope["method"]] += len(message["body"])
        for message in convert_object_to_asgi_messages("Client disconnected", status_code=499):
            await send(message)
    elif path == "large":
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % (2 * LARGE))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for more in (True, False):
            await send({"type": "http.response.body", "body": b"y" * LARGE, "more_body": more})
    elif path == "keeps":  # an answer that goes on after the body has been read
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
    elif path == "decoding":
        for name, value in scope["headers"]:
            if name.lower().replace(b"_", b"-") in (b"x-session-id", b"serve-multiplexed-model-id", b"x-breaks"):
                value.decode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
    elif path == "refused":
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"{}"})
    elif path == "echo":
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"thanks"})


async def endless(receive: Receive, send: Send) -> None:
    """Sends until its client has gone, as the proxy does: it looks for that between two messages."""
    await receive()
    leaving = asyncio.ensure_future(receive())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while not leaving.done():
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        await asyncio.sleep(0)
    DISCONNECTED.append(leaving.result()["type"])


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def url(metrics: Metrics) -> AsyncIterator[str]:
    edge = ProxyEdge(
        RequestIdMiddleware(serve_like),
        metrics=metrics, max_body_bytes=LIMIT, max_memory_bytes=MEMORY,
        write_timeout_s=TIMEOUT_S, linger_s=TIMEOUT_S, get_timeout_s=GET_TIMEOUT_S,
    )  # fmt: skip

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await edge(scope, receive, send)
        ENDED.append(scope["path"])

    server = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.force_exit = server.should_exit = True
    await running


async def get(url: str, **options) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(url, **options)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("404", 503, "engine_unavailable"),
        ("408", 503, "request_timeout"),
        ("429", 503, "overloaded"),
        ("503", 503, "overloaded"),
        ("500", 503, "engine_unavailable"),
        ("nothing", 503, "engine_unavailable"),
        ("silent", 503, "engine_unavailable"),
        ("-/routes", 404, "route_not_found"),
    ],
)
async def test_serve_s_own_answers_become_ours(url: str, path: str, status: int, code: str) -> None:
    answer = await get(f"{url}/{path}", headers={"x-request-id": "mine"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert ("retry-after" in answer.headers) == (status == 503)
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert "Ping" not in answer.text


def test_those_whom_a_full_queue_refused_do_not_come_back_together() -> None:
    waits = {refusal(503).headers()["Retry-After"] for _ in range(200)}
    assert len(waits) > 3
    assert all(1 <= int(wait) <= 10 for wait in waits)


async def test_a_request_has_one_id_from_the_edge_on(url: str) -> None:
    for path in ("metrics", "404", "-/routes"):
        (made,) = (await get(f"{url}/{path}")).headers.get_list("x-request-id")
        assert len(made) == 32
    for wrong in ([b"a b"], [b"a", b"b"], [b"\xff"]):
        refused = await get(f"{url}/metrics", headers=[(b"x-request-id", value) for value in wrong])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-request-id")
        (made,) = refused.headers.get_list("x-request-id")
        assert len(made) == 32, "what was wrong goes no further"


async def test_what_is_said_here_is_counted_here(url: str, metrics: Metrics) -> None:
    for path, headers in (
        ("404", {}),
        ("429", {}),
        ("metrics", {}),
        ("refused", {}),
        ("metrics", {"x-request-id": "a b"}),
        ("readyz", {}),
        ("stream", {}),
    ):
        await get(f"{url}/{path}", headers=headers)
    async with httpx.AsyncClient(timeout=0.2) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"{url}/silent")
    while "/silent" not in ENDED:
        await asyncio.sleep(0.01)
    (rejections,) = metrics.rejections.collect()
    counted = {sample.labels["reason"]: sample.value for sample in rejections.samples if sample.name.endswith("_total")}
    assert {reason: count for reason, count in counted.items() if count} == {
        "engine_unavailable": 2, "overloaded": 1, "invalid_header": 1,
    }  # fmt: skip
    (responses,) = metrics.responses.collect()
    answered = {
        tuple(sample.labels.values()): sample.value for sample in responses.samples if sample.name.endswith("_total")
    }
    assert answered == {
        ("unknown", "503"): 2, ("/metrics", "400"): 1, ("/readyz", "503"): 1, ("unknown", "200"): 1,
    }, "a share of the answers that were refusals is never more than all"  # fmt: skip


async def test_kuberay_s_probe_and_our_metrics_are_left_alone(url: str) -> None:
    assert (await get(f"{url}/metrics")).text == "data: {}\n\n"
    edge = ProxyEdge(serve_like, metrics=Metrics(), max_body_bytes=1, max_memory_bytes=1)
    sent = []

    async def send(message) -> None:
        sent.append(message)

    await edge({"type": "http", "path": "/-/healthz", "headers": []}, send, send)  # pyright: ignore[reportArgumentType]
    assert sent == []


async def test_a_stream_that_lost_its_replica_ends_with_an_error_event(url: str) -> None:
    answer = await get(f"{url}/stream")
    first, last, rest = answer.text.split("\n\n")
    assert (first, rest) == ("data: {}", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"


async def test_any_other_answer_that_lost_it_is_not_taken_for_complete(url: str) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await get(f"{url}/json")


async def raw(url: str, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=2**10)
    writer.write(request)
    await writer.drain()
    return reader, writer


async def test_a_client_that_takes_nothing_has_gone(url: str) -> None:
    DISCONNECTED.clear()
    _reader, writer = await raw(url, b"POST /endless HTTP/1.1\r\nhost: a\r\n\r\n")
    async with asyncio.timeout(20):
        while not DISCONNECTED:
            await asyncio.sleep(0.05)
    assert DISCONNECTED == ["http.disconnect"]
    writer.close()


async def test_a_large_answer_counts_as_held_until_it_is_taken(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.edge_exchange.PIECE_BYTES", 10_000)
    ask = b"POST /large HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"
    for _ in range(3):
        reader, writer = await raw(url, ask)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 400000" in head
        assert await reader.readexactly(2 * LIMIT) == b"y" * 2 * LIMIT, "whole, and the room is given back each time"
        writer.close()
    monkeypatch.setattr("tests.service.http.test_proxy_edge.LARGE", MEMORY + 1)
    reader, writer = await raw(url, ask)
    assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    assert await reader.read() == b"", "there is no room for it"
    writer.close()


async def test_a_client_that_was_refused_gets_its_answer_and_cannot_go_on_sending(url: str) -> None:
    head = b"POST /refused HTTP/1.1\r\nhost: a\r\ncontent-length: 100000000\r\ncontent-type: application/json\r\n\r\n"
    reader, writer = await raw(url, head + b"x" * 10)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")
    async with asyncio.timeout(20):  # it trickles on, and the connection is closed
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("method", "limit"), [("POST", LIMIT), ("GET", MAX_IDLE_BODY_BYTES)])
async def test_a_body_is_bounded_whoever_reads_it(url: str, method: str, limit: int) -> None:
    head = f"{method} /greedy HTTP/1.1\r\nhost: a\r\n".encode()
    TAKEN.clear()
    reader, writer = await raw(url, head + b"content-length: %d\r\n\r\n" % (limit + 1))
    assert b"413" in await reader.readuntil(b"\r\n\r\n")
    assert TAKEN == {}, "refused by its length"
    writer.close()
    chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
    reader, writer = await raw(url, head + b"transfer-encoding: chunked\r\n\r\n" + chunk)
    sending = asyncio.create_task(send_on(writer, chunk))
    async with asyncio.timeout(20):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413")
        assert b"request_too_large" in await reader.readuntil(b"}}")
        assert 0 < TAKEN[method] <= limit
        await sending


async def test_all_bodies_together_are_bounded(url: str) -> None:
    """Until their answers begin: from then on a body has been read and is not kept here."""
    half = b"x" * (MEMORY // 2)
    head = "POST /{} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n"
    TAKEN.clear()
    waiting = [await raw(url, head.format("greedy", LIMIT).encode() + half) for _ in range(2)]
    while sum(TAKEN.values()) < 2 * len(half):
        await asyncio.sleep(0.01)
    reader, writer = await raw(url, head.format("greedy", 10).encode() + b"x" * 10)
    assert b" 503 " in (refused := await reader.readuntil(b"\r\n\r\n"))
    assert b"retry-after" in refused.lower()
    assert b"overloaded" in await reader.readuntil(b"}}")
    writer.close()
    waiting.pop()[1].close()
    kept = [await raw(url, head.format("keeps", len(half)).encode() + half) for _ in range(3)]
    for reader, writer in kept:
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()
    waiting.pop()[1].close()


async def send_on(writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Until the connection is closed."""
    with suppress(ConnectionError):
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)


async def test_headers_that_serve_decodes_do_no_harm(url: str) -> None:
    for name in (b"X-Session-Id", b"x_session_id", b"serve_multiplexed_model_id", b"Serve-Multiplexed-Model-Id"):
        assert (await get(f"{url}/decoding", headers=[(name, b"\xff")])).status_code == 200, name
    for name in (b"x-request-timeout-seconds", b"x-request-disconnect-disabled"):
        refused = await get(f"{url}/decoding", headers=[(name, b"\xff")])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name.decode())


async def test_a_length_that_python_would_not_read_is_refused(url: str) -> None:
    reader, writer = await raw(url, b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: " + b"0" * 5000 + b"\r\n\r\n")
    assert b" 400 " in await reader.readuntil(b"\r\n\r\n")
    assert b'"content-length"' in await reader.readuntil(b"}}")
    writer.close()


async def test_a_failure_of_serve_s_proxy_is_an_answer_of_ours(url: str) -> None:
    answer = await get(f"{url}/decoding", headers=[(b"x-breaks", b"\xff")])
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")


async def test_whatever_is_only_looked_up_has_a_time_limit(url: str) -> None:
    async with httpx.AsyncClient(timeout=10) as client:
        assert (await client.head(f"{url}/silent")).status_code == 503


async def test_the_last_piece_waits_no_longer_than_others() -> None:
    """For a client that has not sent everything, it comes after the others have been taken."""

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message.get("body") == b"":
            await asyncio.Event().wait()

    edge = ProxyEdge(
        serve_like, metrics=Metrics(), max_body_bytes=LIMIT, max_memory_bytes=MEMORY,
        write_timeout_s=TIMEOUT_S, linger_s=TIMEOUT_S,
    )  # fmt: skip
    headers = [(b"content-length", b"10")]
    scope = {"type": "http", "method": "POST", "path": "/refused", "headers": headers}
    async with asyncio.timeout(20):
        await edge(scope, receive, send)


async def test_a_client_that_has_sent_everything_keeps_its_connection(url: str) -> None:
    request = b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}"
    reader, writer = await raw(url, request)
    for _ in range(2):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(request)
    writer.close()


@pytest.mark.parametrize("field", LIMITS)
def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    for value, limit in (("7", 7), ("", getattr(Settings(), field))):
        monkeypatch.setenv("VLSAE_" + field.upper(), value)
        assert middlewares()[0].kwargs[field] == limit


def test_serve_takes_what_it_is_given() -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    assert validate_http_proxy_callback_return(middlewares())
