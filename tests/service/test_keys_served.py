"""Keys, quotas and feedback on a real service with two ingress replicas: they must agree."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from service import keys
from tests.service.running_server import RunningServer, start_server

pytestmark = [pytest.mark.service, pytest.mark.slow]
PER_MINUTE = 30
PATIENCE_S = 30


class KeyFolder:
    """A key file, and the secrets that a real one would not tell."""

    def __init__(self, folder: Path) -> None:
        self.file, self.secrets = folder / "keys.json", {}

    def add(self, name: str, scope: keys.Scope, **quota: int) -> None:
        secret, key = keys.new_key({"name": name, "scopes": [scope], "quota": quota})
        keys.append_key(self.file, key)
        self.secrets[name] = secret

    def headers(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secrets[name]}"}


@pytest.fixture(scope="module")
def folder() -> Iterator[KeyFolder]:
    with tempfile.TemporaryDirectory(prefix="keys") as home:
        folder = KeyFolder(Path(home))
        folder.add("chatter", "chat")
        folder.add("stranger", "chat")
        folder.add("scraper", "metrics")
        folder.add("limited", "chat", requests_per_minute=PER_MINUTE)
        folder.add("patient", "chat", requests_per_minute=PER_MINUTE)
        yield folder


@pytest.fixture(scope="module")
def keyed(folder: KeyFolder, checkpoint: tuple[Path, Path]) -> Iterator[RunningServer]:
    """A service with these keys and two ingress replicas, not patient with bodies."""
    paths = ("--model", str(checkpoint[0]), "--artifact", str(checkpoint[1]))
    options = ("--keys-file", str(folder.file), "--ingress-replicas", "2", "--body-timeout-s", "2")
    running = start_server(*paths, *options, home=folder.file.parent)
    try:
        yield running
        assert not any(secret in running.log() for secret in folder.secrets.values())
        running.stop(signal.SIGINT)
    finally:
        running.process.kill()


def ask(server: RunningServer, secret: str) -> str:
    """The id of an answer."""
    client = server.client(api_key=secret)
    said = {"role": "user", "content": "hello"}
    return client.chat.completions.create(model=server.name, messages=[said], max_tokens=1).id  # pyright: ignore


def until(condition: Callable[[], bool], *, times: int) -> None:
    """It is true so many times in a row, soon."""
    deadline, seen = time.monotonic() + PATIENCE_S, 0
    while seen < times:
        seen = seen + 1 if condition() else 0
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_both_replicas_ask_for_keys(keyed: RunningServer, folder: KeyFolder) -> None:
    ingresses = [line for line in keyed.command_lines().values() if ":Ingress" in line]
    assert len(ingresses) == 2
    assert 'Authorization: Bearer $KEY"' in keyed.log(), "the command to paste has a place for the key"
    for _ in range(8):
        assert keyed.get("/readyz").status_code == 200
        refused = keyed.get("/metrics")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        with pytest.raises(openai.AuthenticationError):
            ask(keyed, "vlsae-guessed")
        with pytest.raises(openai.PermissionDeniedError):
            ask(keyed, folder.secrets["scraper"])
        assert ask(keyed, folder.secrets["chatter"]).startswith("chatcmpl-")


def test_a_quota_is_one_for_all_replicas(keyed: RunningServer, folder: KeyFolder) -> None:
    began = time.monotonic()

    def models(_index: int) -> httpx.Response:
        return httpx.get(keyed.url + "/v1/models", headers=folder.headers("limited"), timeout=30)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(models, range(3 * PER_MINUTE)))
    granted = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(granted) + len(refused) == len(answers)
    refilled = (time.monotonic() - began) * PER_MINUTE / 60
    assert PER_MINUTE <= len(granted) <= PER_MINUTE + refilled + 1
    assert {answer.headers["retry-after"] for answer in refused} <= {"1", "2"}
    with pytest.raises(openai.RateLimitError):
        ask(keyed, folder.secrets["limited"])


def test_a_client_that_waits_as_told_is_served(keyed: RunningServer, folder: KeyFolder) -> None:
    """The official client does so by itself."""
    client = keyed.client(api_key=folder.secrets["patient"], max_retries=1)
    for _ in range(PER_MINUTE + 1):
        client.models.list()


def test_feedback_reaches_the_replica_that_knows_the_answer(keyed: RunningServer, folder: KeyFolder) -> None:
    for _ in range(10):
        given = {"request_id": ask(keyed, folder.secrets["chatter"]), "score": 0.5}
        statuses = [
            httpx.post(keyed.url + "/v1/feedback", json=given, headers=folder.headers(name), timeout=30).status_code
            for name in ("stranger", "chatter", "chatter")
        ]
        assert statuses == [404, 200, 404]


def test_a_body_that_stops_half_way_is_given_up(keyed: RunningServer, folder: KeyFolder) -> None:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {folder.secrets['chatter']}\r\ncontent-length: 100\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", keyed.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head.encode() + b'{"model"')
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer


def test_keys_are_exchanged_under_way(keyed: RunningServer, folder: KeyFolder) -> None:
    before = folder.file.read_text()

    def status() -> int:
        return httpx.get(keyed.url + "/version", headers=folder.headers("new"), timeout=30).status_code

    folder.add("new", "chat")
    until(lambda: status() == 200, times=10)
    folder.file.write_text("{")
    time.sleep(1.1)
    assert {status() for _ in range(10)} == {200}, "a broken file takes no keys away"
    folder.file.write_text(before)
    until(lambda: status() == 401, times=10)


def test_while_the_ledger_is_lost_nothing_goes_unmetered(keyed: RunningServer, folder: KeyFolder) -> None:
    """It is started again; a key without a quota is served all the time."""

    def status(name: str) -> int:
        return httpx.get(keyed.url + "/v1/models", headers=folder.headers(name), timeout=30).status_code

    folder.add("third", "chat", requests_per_minute=100_000)
    until(lambda: status("third") == 200, times=10)
    os.kill(keyed.pid_of(":Ledger"), signal.SIGKILL)
    seen = set()

    def back() -> bool:
        seen.add(status("third"))
        assert status("chatter") == 200
        return seen >= {503} and status("third") == 200

    until(back, times=10)
    assert seen == {200, 503}
