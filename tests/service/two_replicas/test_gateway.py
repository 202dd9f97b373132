"""A service that started its gateway itself: nothing goes past it, and it is never gone for long."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.service.hostile.clients import first_status
from tests.service.hostile.wire import request
from tests.service.watched_server import Watched

pytestmark = [pytest.mark.service, pytest.mark.slow]
PATIENCE_S = 40


def serve_s_own_url(watched: Watched) -> str:
    environment = Path(f"/proc/{watched.server.pid_of('haproxy.cfg')}/environ").read_text().split("\0")
    return "http://" + next(one for one in environment if one.startswith("GATEWAY_SERVER=")).partition("=")[2]


def test_who_goes_past_it_is_refused(watched: Watched) -> None:
    past = httpx.get(serve_s_own_url(watched) + "/v1/models", headers=watched.key("alice"))
    assert (past.status_code, past.json()["error"]["code"]) == (403, "permission_denied")
    assert watched.client.get("/v1/models").status_code == 200


def test_a_chunked_body_may_be_as_large_as_any_and_no_larger(watched: Watched) -> None:
    """Its content is not JSON, which is said of what was read to its end."""
    head = request(
        b"", "Host: a", "Content-Type: application/json", "Transfer-Encoding: chunked",
        f"Authorization: Bearer {watched.secrets['alice']}", only=True,
    )  # fmt: skip
    chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
    for mebibytes, status in ((47, 400), (49, 413)):
        with socket.create_connection(("127.0.0.1", watched.server.port), timeout=PATIENCE_S) as connection:
            with suppress(ConnectionError):
                for piece in (head, *[chunk] * mebibytes, b"0\r\n\r\n"):
                    connection.sendall(piece)
            assert first_status(connection) == status


def test_a_gateway_that_is_killed_is_back_and_the_service_says_so(watched: Watched) -> None:
    lost = watched.server.pid_of("haproxy.cfg")
    os.kill(lost, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while "the gateway ended (status -9): starting it again" not in watched.server.log():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    retrying = httpx.Client(base_url=watched.server.url, transport=httpx.HTTPTransport(retries=9))
    assert retrying.get("/readyz", timeout=PATIENCE_S).status_code == 200
    assert watched.server.pid_of("haproxy.cfg") != lost
