"""Keys, quotas and feedback: two ingress replicas must agree, also while keys change and while their ledger is lost."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from service.callers import keys
from service.watched_file import LOOK_EVERY_S
from tests.service.watched_server import REQUESTS_PER_MINUTE, Watched

pytestmark = [pytest.mark.service, pytest.mark.slow]
PATIENCE_S = 30


def ask(watched: Watched, secret: str) -> str:
    """The id of an answer."""
    said = {"role": "user", "content": "hello"}
    create = watched.server.client(api_key=secret).chat.completions.create
    return create(model=watched.server.name, messages=[said], max_tokens=1).id  # pyright: ignore


def status(watched: Watched, name: str) -> int:
    """Of a small request with that key, on a connection of its own."""
    return httpx.get(watched.server.url + "/v1/models", headers=watched.key(name), timeout=PATIENCE_S).status_code


def add_key(watched: Watched, name: str, **quota: int) -> None:
    watched.secrets[name], key = keys.new_key({"name": name, "scopes": ["chat"], "quota": quota})
    keys.append_key(watched.home / "keys.json", key)


def until(condition: Callable[[], bool], *, times: int = 10) -> None:
    """It is true so many times in a row, soon."""
    deadline, seen = time.monotonic() + PATIENCE_S, 0
    while seen < times:
        seen = seen + 1 if condition() else 0
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_both_replicas_ask_for_keys(watched: Watched) -> None:
    assert 'Authorization: Bearer $KEY"' in watched.server.log(), "the command to paste has a place for the key"
    logged = len(watched.lines())

    def all_answered_by_both() -> bool:
        """Which of the two is asked is a matter of chance."""
        lines = watched.lines()[logged:]
        return all(len({one["process"] for one in lines if one["status"] == code}) == 2 for code in (401, 403, 200))

    deadline = time.monotonic() + PATIENCE_S
    while not all_answered_by_both():
        assert time.monotonic() < deadline
        refused = watched.server.get("/metrics")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        with pytest.raises(openai.AuthenticationError):
            ask(watched, "vlsae-guessed")
        with pytest.raises(openai.PermissionDeniedError):
            ask(watched, watched.secrets["monitor"])
        assert ask(watched, watched.secrets["alice"]).startswith("chatcmpl-")


def test_a_quota_is_one_for_all_replicas(watched: Watched) -> None:
    began = time.monotonic()

    def models(_index: int) -> httpx.Response:
        return httpx.get(watched.server.url + "/v1/models", headers=watched.key("limited"), timeout=PATIENCE_S)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(models, range(3 * REQUESTS_PER_MINUTE)))
    granted = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(granted) + len(refused) == len(answers)
    refilled = (time.monotonic() - began) * REQUESTS_PER_MINUTE / 60
    assert REQUESTS_PER_MINUTE <= len(granted) <= REQUESTS_PER_MINUTE + refilled + 1
    assert {answer.headers["retry-after"] for answer in refused} <= {"1", "2"}

    def ask_for_a_minute_s_worth() -> None:  # a place may have become free by now, not so many
        for _ in range(REQUESTS_PER_MINUTE):
            ask(watched, watched.secrets["limited"])

    with pytest.raises(openai.RateLimitError):
        ask_for_a_minute_s_worth()


def test_a_client_that_waits_as_told_is_served(watched: Watched) -> None:
    """The official client does so by itself."""
    client = watched.server.client(api_key=watched.secrets["patient"], max_retries=1)
    for _ in range(REQUESTS_PER_MINUTE + 1):
        client.models.list()


def test_feedback_reaches_the_replica_that_knows_the_answer(watched: Watched) -> None:
    for _ in range(6):
        given = {"request_id": ask(watched, watched.secrets["alice"]), "score": 0.5}
        statuses = [
            httpx.post(watched.server.url + "/v1/feedback", json=given, headers=watched.key(name)).status_code
            for name in ("bob", "alice", "alice")
        ]
        assert statuses == [404, 200, 404]


def test_a_body_that_stops_half_way_is_given_up(watched: Watched) -> None:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {watched.secrets['alice']}\r\ncontent-length: 100\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", watched.server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + b'{"model"')
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer


def test_keys_are_exchanged_under_way(watched: Watched) -> None:
    file = watched.home / "keys.json"
    before = file.read_text()
    add_key(watched, "new")
    until(lambda: status(watched, "new") == 200)
    file.write_text("{")
    time.sleep(LOOK_EVERY_S + 0.1)
    assert {status(watched, "new") for _ in range(10)} == {200}, "a broken file takes no keys away"
    file.write_text(before)
    until(lambda: status(watched, "new") == 401)


def test_while_the_ledger_is_lost_nothing_goes_unmetered(watched: Watched) -> None:
    """It is started again; a key without a quota is served all the time."""
    add_key(watched, "third", requests_per_minute=100_000)
    until(lambda: status(watched, "third") == 200)
    os.kill(watched.server.pid_of(":Ledger"), signal.SIGKILL)
    seen = set()

    def back() -> bool:
        seen.add(status(watched, "third"))
        assert status(watched, "bob") == 200
        return seen >= {503} and status(watched, "third") == 200

    until(back)
    assert seen == {200, 503}
