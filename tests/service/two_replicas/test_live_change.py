"""The default strength changes under load, on two ingress replicas: no request fails, receipts say old, then new."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.service.examples import encoded, image_part, user
from tests.service.watched_server import Watched
from tests.tiny_models import drawn_image

pytestmark = [pytest.mark.service, pytest.mark.slow]
CHAT = "/v1/chat/completions"
CLIENTS = 4
PATIENCE_S = 60


class Load:
    """Clients that ask one thing after another, and what they were answered: (when it was asked, status, strength)."""

    def __init__(self, watched: Watched) -> None:
        self._watched, self._stop = watched, threading.Event()
        self.seen: list[tuple[float, int, float | None]] = []

    def run(self) -> None:
        ask = {"model": self._watched.server.name, "max_tokens": 2, "temperature": 0,
               "messages": [user(image_part(encoded(drawn_image(1))), "what ?")]}  # fmt: skip
        while not self._stop.is_set():
            began = time.monotonic()
            answer = self._watched.client.post(CHAT, json=ask)
            receipt = answer.json().get("steering", {})
            self.seen.append((began, answer.status_code, receipt.get("strength")))

    def stop(self) -> None:
        self._stop.set()

    def answered(self, strength: float | None, since: float) -> bool:
        """Whether many requests in a row that began later had this strength."""
        later = [found for began, _status, found in self.seen if began > since]
        return len(later) >= 10 and set(later[-10:]) == {strength}


@pytest.fixture
def load(watched: Watched) -> Iterator[Load]:
    load = Load(watched)
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(load.run) for _ in range(CLIENTS)]
        try:
            yield load
        finally:
            load.stop()
        for client in running:
            client.result()


def wait_for(load: Load, strength: float | None) -> None:
    began = time.monotonic()
    while not load.answered(strength, began):
        assert time.monotonic() < began + PATIENCE_S, load.seen[-10:]
        time.sleep(0.1)


def told_by_all(watched: Watched) -> list[dict]:
    """Of either ingress replica, whichever answers."""
    return [watched.client.get("/version").json()["live_settings"] for _ in range(12)]


def test_a_change_under_load_loses_no_request(watched: Watched, load: Load) -> None:
    file = watched.home / "live.json"
    wait_for(load, 1.0)
    file.write_text(json.dumps({"default_strength": 0.5}))
    wait_for(load, 0.5)
    assert {json.dumps(told["changed"]) for told in told_by_all(watched)} == {'{"default_strength": 0.5}'}
    file.write_text(json.dumps({"default_strength": 5}))
    time.sleep(2.5)
    wait_for(load, 0.5)
    assert all("less than or equal to 1" in (told["refused"] or "") for told in told_by_all(watched))
    file.unlink()
    wait_for(load, 1.0)
    load.stop()
    assert {status for _, status, _ in load.seen} == {200}
    assert {strength for *_, strength in load.seen} == {1.0, 0.5}
