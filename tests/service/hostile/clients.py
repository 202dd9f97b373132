"""Clients that behave badly on a socket. Each gets an Address and returns the status it saw, 0 where it saw none."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing, suppress
from typing import NamedTuple

from tests.service.examples import body, user
from tests.service.hostile.wire import get, plain, request

TIMEOUT_S = 20.0
"""A server that has not answered by then never will."""


class Address(NamedTuple):
    """Where the server is, and what is asked of it."""

    port: int
    model: str
    endless: dict
    """A request whose answer goes on until the context is full."""

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)

    def stream(self) -> bytes:
        """The endless request as a stream, on the wire."""
        return request(json.dumps({**self.endless, "stream": True}).encode())


def first_status(connection: socket.socket) -> int:
    """Of the first answer that is not 1xx; 0 where the server closes without one."""
    with connection.makefile("rb") as answer:
        try:
            while line := answer.readline(65_536):
                words = line.split()
                if words[:1] and words[0].startswith(b"HTTP/") and not words[1].startswith(b"1"):
                    return int(words[1])
        except ConnectionError:
            pass
    return 0


def send(address: Address, data: bytes) -> int:
    """Send bytes, read one status, hang up."""
    with closing(address.connect()) as connection:
        with suppress(ConnectionError):  # refused before it was all sent; the answer may be there all the same
            connection.sendall(data)
        return first_status(connection)


def reset(connection: socket.socket) -> None:
    """Close with a reset instead of a farewell."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def comes_and_goes(address: Address) -> int:
    address.connect().close()
    return 0


def comes_and_resets(address: Address) -> int:
    reset(address.connect())
    return 0


def half_a_head(address: Address) -> int:
    with closing(address.connect()) as connection:
        connection.sendall(request(plain(address.model))[:60])
    return 0


def half_a_body(address: Address) -> int:
    with closing(address.connect()) as connection:
        connection.sendall(request(plain(address.model))[:-20])
        time.sleep(0.1)
    return 0


def half_a_body_and_a_half_close(address: Address) -> int:
    with closing(address.connect()) as connection:
        connection.sendall(request(plain(address.model))[:-20])
        connection.shutdown(socket.SHUT_WR)
        return first_status(connection)


def half_a_chunk(address: Address) -> int:
    with closing(address.connect()) as connection:
        head = request(
            b"", "Host: localhost", "Content-Type: application/json", "Transfer-Encoding: chunked", only=True
        )
        connection.sendall(head + b"ffff\r\n{")
        time.sleep(0.1)
    return 0


def head_byte_by_byte(address: Address) -> int:
    with closing(address.connect()) as connection:
        for byte in get("/healthz"):
            connection.sendall(bytes((byte,)))
        return first_status(connection)


def body_byte_by_byte(address: Address) -> int:
    with closing(address.connect()) as connection:
        for byte in request(plain(address.model)):
            connection.sendall(bytes((byte,)))
        return first_status(connection)


def leaves_before_the_answer(address: Address) -> int:
    with closing(address.connect()) as connection:
        connection.sendall(address.stream())
    return 0


def leaves_after_the_first_byte(address: Address) -> int:
    with closing(address.connect()) as connection:
        connection.sendall(address.stream())
        return first_status(connection)


def resets_in_the_middle(address: Address) -> int:
    connection = address.connect()
    connection.sendall(address.stream())
    connection.recv(2000)
    reset(connection)
    return 0


def half_closes_and_reads(address: Address) -> int:
    """It has said all it wants to say, and still listens."""
    with closing(address.connect()) as connection:
        connection.sendall(request(plain(address.model)))
        connection.shutdown(socket.SHUT_WR)
        return first_status(connection)


def half_closes_a_stream(address: Address) -> int:
    with closing(address.connect()) as connection:
        connection.sendall(address.stream())
        connection.recv(1)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65_536):
            pass
    return 0


def reads_nothing(address: Address) -> int:
    with closing(address.connect()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(address.stream())
        time.sleep(0.5)
    return 0


def reads_byte_by_byte(address: Address) -> int:
    with closing(address.connect()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(address.stream())
        for _ in range(200):
            connection.recv(1)
    return 0


def asks_three_times_at_once(address: Address) -> int:
    """Pipelining: three requests before the first answer."""
    asked = request(plain(address.model)).replace(b"Connection: close\r\n", b"")
    return send(address, asked + asked + get("/healthz"))


def says_more_than_it_should(address: Address) -> int:
    return send(address, request(plain(address.model)) + b"GET /metrics HTTP/1.1\r\n\r\n" * 100)


def many_that_say_nothing(address: Address) -> int:
    connections = [address.connect() for _ in range(100)]
    status = send(address, get("/healthz"))
    for connection in connections:
        connection.close()
    return status


def many_that_leave(address: Address) -> int:
    connections = [address.connect() for _ in range(20)]
    for connection in connections:
        connection.sendall(address.stream())
    for connection in connections:
        connection.close()
    return 0


def endless_request(model: str, end_token: int, context_tokens: int) -> dict:
    """Its answer cannot end before the context does."""
    return body(user("go on"), model=model, max_tokens=context_tokens - 60, logit_bias={str(end_token): -100})


BEHAVIOURS: dict[Callable[[Address], int], set[int]] = {
    comes_and_goes: {0},
    comes_and_resets: {0},
    half_a_head: {0},
    half_a_body: {0},
    half_a_body_and_a_half_close: {0, 400},
    half_a_chunk: {0},
    head_byte_by_byte: {200},
    body_byte_by_byte: {200},
    leaves_before_the_answer: {0},
    leaves_after_the_first_byte: {200},
    resets_in_the_middle: {0},
    half_closes_and_reads: {0, 200, 400},
    half_closes_a_stream: {0},
    reads_nothing: {0},
    reads_byte_by_byte: {0},
    asks_three_times_at_once: {200},
    says_more_than_it_should: {200},
    many_that_say_nothing: {200},
    many_that_leave: {0},
}
"""Behaviour to the statuses it may see."""
