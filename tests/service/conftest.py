"""Fixtures of the service's tests: tiny real tokenizers; one real server per engine for all tests marked `service`."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletion
from transformers import AutoProcessor

from service import watched_file
from service.settings import BUNDLED_MODEL
from tests.service.asking import GREEDY
from tests.service.hostile.urls import ALLOWED_HOSTS
from tests.service.running_server import ENGINES, RunningServer, start_server
from tests.tiny_models import save_tiny_artifact

FOREIGN_RAY = {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_TOKEN_PATH": "/nowhere"}
"""A Ray that is not there: a service that tried to join it could not start."""
MAX_ONGOING, MAX_QUEUED = 12, 8
"""Small, so that a test can fill them."""


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """More than a second passes."""
    now = watched_file.time.monotonic()

    def advance() -> None:
        nonlocal now
        now += 1.1
        monkeypatch.setattr(watched_file.time, "monotonic", lambda: now)

    return advance


@pytest.fixture(scope="session")
def tiny_processor(tiny_llava: Path):
    return AutoProcessor.from_pretrained(tiny_llava)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What the real server serves: the bundled miniature, and an artifact whose presets no tuning changes."""
    folder = tmp_path_factory.mktemp("service") / "artifact"
    return BUNDLED_MODEL, save_tiny_artifact(folder, BUNDLED_MODEL)


@pytest.fixture(scope="session", params=ENGINES)
def server(request: pytest.FixtureRequest, checkpoint: tuple[Path, Path]) -> Iterator[RunningServer]:
    """The one real server per engine, one at a time. Its end is a test too: Ctrl-C leaves no process and no folder."""
    model, artifact = checkpoint
    with tempfile.TemporaryDirectory(prefix="srv") as home:
        limits = ("--max-ongoing-requests", str(MAX_ONGOING), "--max-queued-requests", str(MAX_QUEUED))
        paths = ("--model", str(model), "--artifact", str(artifact), "--image-hosts", ALLOWED_HOSTS)
        running = start_server(*paths, *limits, engine=request.param, home=Path(home), environment=FOREIGN_RAY)
        try:
            yield running
            family = running.family()
            assert len(family) > 5, "Ray, proxy, controller, two replicas, decoders"
            assert running.stop(signal.SIGINT) == 0, running.log()
            assert running.alive(family) == []
            assert list(Path(home).glob("vlsae-*")) == []
        finally:
            running.process.kill()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def ask(client: openai.OpenAI, server: RunningServer):
    """A greedy question about a picture, with changes; fields that OpenAI does not know go into `extra`."""

    def send(alias: str = "", extra: dict | None = None, **changes) -> ChatCompletion:
        options = {**GREEDY, **changes}
        return client.chat.completions.create(model=server.name + alias, extra_body=extra or {}, **options)

    return send
