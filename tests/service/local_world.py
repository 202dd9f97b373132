"""A stand-in for the Internet on loopback: names with any addresses, and one real TLS server behind all of them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import httpcore
import trustme

from service.images.remote import RemoteImages, tcp_connector

HOST = "images.example"
PUBLIC = "203.1.113.7"
"""An address like any other; nothing is ever sent to it."""

AUTHORITY = trustme.CA()


def answer(body: bytes = b"", *headers: str, status: str = "200 OK", media_type: str = "image/png") -> bytes:
    """An HTTP answer as it goes over the wire."""
    lines = [f"HTTP/1.1 {status}", f"content-type: {media_type}", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


class LocalWorld(httpcore.AsyncNetworkBackend):
    """Resolver and connector in one; `connected` is where the client went, by address, before it was diverted here."""

    def __init__(self) -> None:
        self.authority = AUTHORITY
        self.names: dict[str, list[str]] = {HOST: [PUBLIC]}
        self.resolved: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.requests: list[str] = []
        self.asked_names: list[str | None] = []
        self.pieces: Iterable[bytes] = ()
        self.pause_s = 0.0
        """Seconds between two pieces of an answer."""
        self.unreachable: set[str] = set()
        self.port = 0

    async def resolve(self, host: str) -> list[str]:
        self.resolved.append(host)
        if host not in self.names:
            raise OSError(f"{host} is not known")
        return self.names[host]

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.connected.append((host, port))
        if host in self.unreachable:
            raise httpcore.ConnectError("unreachable")
        return await tcp_connector().connect_tcp("127.0.0.1", self.port, timeout, local_address, socket_options)

    def images(self, hosts: str = HOST, **changes) -> RemoteImages:
        """A client for whom this is the world."""
        trust = ssl.create_default_context()
        self.authority.configure_trust(trust)
        limits = {"timeout_s": 5, "max_image_bytes": 10_000}
        return RemoteImages(hosts, **{**limits, "resolve": self.resolve, "connector": self, "tls": trust, **changes})

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
            for piece in self.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(self.pause_s)
            if self.pieces == ():
                await reader.read()  # says nothing until the client goes
        except (ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def running(self, certified: str = HOST) -> AsyncIterator[LocalWorld]:
        """The TLS server, with a certificate for one name."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(certified).configure_cert(context)
        context.sni_callback = lambda _socket, name, _context: self.asked_names.append(name)
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
