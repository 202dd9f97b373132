"""One TCP connection to Serve's proxy: how many there may be, how large a request's head, how long it may take to come,
how slowly a client may take its answer, and that it asks one thing at a time.

uvicorn bounds none: a client could fill the proxy's memory with one header, hold connections that never ask anything,
leave its answers lying there, or hide behind a second request that it has gone. Used in the proxy's process, where
`proxy_edge.middlewares` puts it into uvicorn's table of protocols. Knows no routes, no settings and no Serve.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable
from typing import Any, cast

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import ApiError

IMPORT_PATH = "service.http.http_connection:BoundedConnection"
MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers together."""
MAX_CONNECTIONS = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
"""Of one proxy: it needs descriptors for its replicas, too."""
HEAD_TIMEOUT_S = 20.0
"""From the first moment of a connection, or the first byte of its next request, to the end of the head."""
TAKE_TIMEOUT_S = 30.0
"""An answer of which a client takes less than TAKEN_SHARE in so long is thrown away, and its connection with it."""
TAKEN_SHARE = 0.05
"""Of what was waiting at first."""


def bound_connections() -> None:
    """Servers that uvicorn starts from here on in this process talk to their clients as below."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = IMPORT_PATH


class TooMuch(Exception):
    """Ends the parser's work."""


class _Transport:
    """The connection's transport, which tells when it is closed: that alone lets it wait for ever for the client."""

    def __init__(self, transport: asyncio.Transport, closed: Callable[[], None]) -> None:
        self._transport, self._closed = transport, closed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._transport.close()
        self._closed()


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection with limits, without WebSockets, and with OpenAI's error object for what is not HTTP."""

    head_timeout_s = HEAD_TIMEOUT_S
    take_timeout_s = TAKE_TIMEOUT_S
    max_connections = MAX_CONNECTIONS
    _reading_head = False
    _head_began = False
    """With the bytes that are being parsed."""
    _heard = False
    """The parser made something of the bytes that are being parsed."""
    _is_broken = False
    """What the client sends makes no sense any more; it still gets the answers to what did."""
    _head_bytes = 0
    _unparsed_bytes = 0
    """Received for this head or trailer so far, perhaps still in the parser: it hands out whole headers only."""
    _timer: asyncio.TimerHandle | None = None
    _take_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, _Transport(transport, self._watch_taking))
        if len(self.connections) > self.max_connections:
            self._answer_and_close(ApiError("overloaded", "too many connections at once; try again later"))
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_taking()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_watching()

    def data_received(self, data: bytes) -> None:
        if self._is_broken:
            return
        self._head_began = self._heard = False
        super().data_received(data)
        if self._is_broken or self.transport.is_closing():
            return
        if self._heard and not self._reading_head:
            self._unparsed_bytes = 0
        elif not self._head_began:  # or some of it belongs to the request before
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > MAX_HEAD_BYTES:
                self.send_400_response("")
                return
        self._await_head()

    def on_message_begin(self) -> None:
        if self._is_answering():  # behind a second request it would not be seen that the client has gone
            raise TooMuch
        super().on_message_begin()
        self._reading_head, self._head_began, self._head_bytes, self._unparsed_bytes = True, True, 0, 0

    def on_body(self, body: bytes) -> None:
        self._heard = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._heard = True
        super().on_message_complete()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading_head, self._heard = False, True
        self._stop_timer()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_broken:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """In our words, whatever uvicorn's are; the rest of what the client sends is read and forgotten.

        While an answer is on its way nothing is written into it: the connection ends with that answer.
        """
        if self._is_answering() and (self.cycle.response_started or not self.cycle.more_body):
            self._is_broken, self.cycle.keep_alive = True, False
            return
        self._answer_and_close(
            ApiError(
                "invalid_header", f"this is not a request in HTTP/1.1 whose head has at most {MAX_HEAD_BYTES} bytes"
            )
        )

    def _answer_and_close(self, error: ApiError) -> None:
        content = json.dumps(error.body()).encode()
        headers = {
            **error.headers(),
            "content-type": "application/json",
            "content-length": len(content),
            "connection": "close",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[error.status] + head.encode() + b"\r\n" + content)
        self.transport.close()

    def _should_upgrade_to_ws(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade that is not made is answered like any other request."""

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise TooMuch

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        """Whoever has all its answers asks in time, whatever it sends instead."""
        if self._timer is None and not self._is_answering():
            self._start_timer()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout_s, self._hang_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hang_up(self) -> None:
        self._timer = None
        self.transport.close()

    def _watch_taking(self) -> None:
        """From here on the client takes its share in each period, until nothing is left or writing goes on."""
        waiting = self.transport.get_write_buffer_size()
        if waiting and self._take_timer is None:
            self._watch_share(waiting, TAKEN_SHARE * waiting)

    def _watch_share(self, waiting: int, share: float) -> None:
        self._take_timer = self.loop.call_later(self.take_timeout_s, self._look_at_taking, waiting - share, share)

    def _look_at_taking(self, most: float, share: float) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._take_timer = None
        if waiting > max(most, 0):
            self.transport.abort()
        elif waiting:
            self._watch_share(waiting, share)

    def _stop_watching(self) -> None:
        if self._take_timer is not None:
            self._take_timer.cancel()
            self._take_timer = None
