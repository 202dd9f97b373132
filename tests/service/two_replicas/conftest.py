"""One real service of two ingress and two model replicas and a gateway, with keys, a log file and a trace collector."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.callers import keys
from tests.service.running_server import start_server
from tests.service.trace_collector import collecting_traces
from tests.service.watched_server import REQUESTS_PER_MINUTE, Watched

LIMITED = {"requests_per_minute": REQUESTS_PER_MINUTE}
KEYS = {
    "alice": ["chat"],
    "bob": ["chat"],
    "monitor": ["metrics"],
    "limited": ["chat"],
    "patient": ["chat"],
}


@pytest.fixture(scope="package")
def watched(checkpoint: tuple[Path, Path]) -> Iterator[Watched]:
    with tempfile.TemporaryDirectory(prefix="srv") as folder, collecting_traces() as collector:
        home, secrets = Path(folder), {}
        for name, scopes in KEYS.items():
            quota = LIMITED if name in ("limited", "patient") else {}
            secrets[name], key = keys.new_key({"name": name, "scopes": scopes, "quota": quota})
            keys.append_key(home / "keys.json", key)
        server = start_server(
            "--model", str(checkpoint[0]), "--artifact", str(checkpoint[1]), "--keys-file", str(home / "keys.json"),
            "--ingress-replicas", "2", "--model-replicas", "2", "--log-file", str(home / "service.log"),
            "--gateway", "on", "--traces-endpoint", collector.endpoint, "--body-timeout-s", "3",
            "--live-file", str(home / "live.json"), home=home,
        )  # fmt: skip
        try:
            yield Watched(server, home, secrets, collector)
            assert not any(secret in server.log() for secret in secrets.values())
            assert server.stop(signal.SIGINT) == 0
        finally:
            server.process.kill()
