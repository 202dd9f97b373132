"""Fixtures of the service's tests: tiny real tokenizers; one real server per engine for all tests marked `service`."""

from __future__ import annotations

import json
import shutil
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


@pytest.fixture(scope="session")
def published(published_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in a published layout, and its artifact. Its one head of 32 is the smallest vLLM takes on a CPU."""
    folder = tmp_path_factory.mktemp("published_service")
    model = Path(shutil.copytree(published_llava, folder / published_llava.name))
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    (model / "config.json").write_text(json.dumps(config))
    return model, save_tiny_artifact(folder / "artifact", model)


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
