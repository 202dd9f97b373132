"""Fixtures of the service's tests: tiny real tokenizers, and one real server for all tests marked `service`."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoProcessor

from service.settings import BUNDLED_MODEL
from tests.service.running_server import RunningServer, start_server
from tests.tiny_models import save_tiny_artifact

FOREIGN_RAY = {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_TOKEN_PATH": "/nowhere"}
"""A Ray that is not there: a service that tried to join it could not start."""
MAX_ONGOING, MAX_QUEUED = 12, 8
"""Small, so that a test can fill them."""


@pytest.fixture(scope="session")
def tiny_processor(tiny_llava: Path):
    return AutoProcessor.from_pretrained(tiny_llava)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What the real server serves: the bundled miniature, and an artifact whose presets no tuning changes."""
    folder = tmp_path_factory.mktemp("service") / "artifact"
    return BUNDLED_MODEL, save_tiny_artifact(folder, BUNDLED_MODEL)


@pytest.fixture(scope="session")
def server(checkpoint: tuple[Path, Path]) -> Iterator[RunningServer]:
    """The one real server. Its end is a test too: Ctrl-C leaves no process and no folder."""
    model, artifact = checkpoint
    with tempfile.TemporaryDirectory(prefix="srv") as home:
        limits = ("--max-ongoing-requests", str(MAX_ONGOING), "--max-queued-requests", str(MAX_QUEUED))
        running = start_server(
            "--model", str(model), "--artifact", str(artifact), *limits, home=Path(home), environment=FOREIGN_RAY
        )
        try:
            yield running
            family = running.family()
            assert len(family) > 5, "Ray, proxy, controller, two replicas, decoders"
            assert running.stop(signal.SIGINT) == 0, running.log()
            assert running.alive(family) == []
            assert list(Path(home).glob("vlsae-*")) == []
        finally:
            running.process.kill()
