"""Gateways for tests: in front of anything, with other values, without one of the limits; and something behind them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from service.gateway import CONFIGURATION, Gateway
from tests.service.running_server import free_port

TOKEN, TOKENS = b"data: {}\n\n", 10
LIMIT = re.compile(r"    # limit: ([a-z-]+)(?:: .*)?\n((?:    .+\n)+)")
"""A paragraph of the configuration: its name and its lines."""


@contextmanager
def running_gateway(server_port: int, configuration: Path = CONFIGURATION, **values: Any) -> Iterator[int]:
    """Its port. `values`: of the configuration's variables, without their GATEWAY_."""
    port = free_port()
    given = {f"GATEWAY_{name}": str(value) for name, value in values.items()}
    ours = {"GATEWAY_BIND": f"127.0.0.1:{port}", "GATEWAY_SERVER": f"127.0.0.1:{server_port}"}
    gateway = Gateway({**ours, **given}, configuration)
    gateway.start()
    try:
        yield port
    finally:
        gateway.stop()


def limits() -> dict[str, str]:
    """Name to paragraph."""
    return {found[1]: found[0] for found in LIMIT.finditer(CONFIGURATION.read_text())}


def without(limit: str, folder: Path) -> Path:
    """A copy of the configuration that lacks one limit."""
    (folder / "body_limit.lua").write_bytes(CONFIGURATION.with_name("body_limit.lua").read_bytes())
    copy = folder / "haproxy.cfg"
    copy.write_text(CONFIGURATION.read_text().replace(limits()[limit], ""))
    return copy


class Backend:
    """What Serve's proxy does where it does not do well, by path; elsewhere it says what it was asked. No limits."""

    def __init__(self) -> None:
        self.port = 0
        self.taken_bytes = 0
        """Of bodies."""
        self.wanted = asyncio.Semaphore(0)
        """Tokens that may be sent."""
        self.left: list[str] = []
        """Paths whose clients have gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rpartition("/")[2]
        if path.isdigit():
            await answer(send, int(path), "text/plain; charset=utf-8", "Path '/' not found. Ping 10.0.0.1 ...")
        elif path == "silent":
            await self._until_left(scope, receive)
        elif path in ("paused", "cut"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            if path == "paused":
                await self._until_left(scope, receive)
        elif path == "tokens":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(TOKENS):
                await self.wanted.acquire()
                await send({"type": "http.response.body", "body": TOKEN, "more_body": True})
        elif path == "endless":
            leaving = asyncio.ensure_future(self._until_left(scope, receive))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not leaving.done():
                await send({"type": "http.response.body", "body": bytes(1_000_000), "more_body": True})
                await asyncio.sleep(0)
        elif path != "lost":
            more = True
            while more:
                message = await receive()
                self.taken_bytes += len(message.get("body", b""))
                more = message.get("more_body", False)
            headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]]
            seen = {"method": scope["method"], "path": scope["path"], "headers": headers}
            await answer(send, 200, "application/json", json.dumps(seen))

    async def _until_left(self, scope: Scope, receive: Receive) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            self.taken_bytes += len(message["body"])
        self.left.append(scope["path"])


async def answer(send: Send, status: int, kind: str, content: str) -> None:
    headers = [(b"content-type", kind.encode()), (b"x-request-id", b"of-serve")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content.encode()})


@asynccontextmanager
async def running_backend() -> AsyncIterator[Backend]:
    backend = Backend()
    server = uvicorn.Server(uvicorn.Config(backend, port=0, log_level="critical", lifespan="off"))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    backend.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield backend
    finally:
        server.force_exit = server.should_exit = True
        await running
