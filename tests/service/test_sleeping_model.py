"""A real service whose model may have no replica: it goes without load, probes let it sleep, a request wakes it."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.asking import GREEDY, receipt
from tests.service.running_server import PATIENCE_S, RunningServer, start_server

PROBES = 30
"""Of each kind, a tenth of a second apart, so that the ingress looks by itself, too."""
OFTEN = {"RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}
"""Serve's autoscaler hears of the load each second, and this takes less time."""


def models(server: RunningServer) -> list[int]:
    return [pid for pid, line in server.command_lines().items() if ":Model" in line]


def wait_for(condition: Callable[[], bool], server: RunningServer) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.1)


@pytest.mark.service
@pytest.mark.slow
def test_a_model_goes_to_sleep_and_a_request_wakes_it(checkpoint: tuple[Path, Path]) -> None:
    model, artifact = checkpoint
    with tempfile.TemporaryDirectory(prefix="srv") as home:
        server = start_server(
            "--model", str(model), "--artifact", str(artifact), "--min-replicas", "0", "--scale-down-delay-s", "1",
            home=Path(home), environment=OFTEN,
        )  # fmt: skip
        try:
            assert len(models(server)) == 1, "an artifact is looked at before the first request"
            awake = server.get("/version").json()
            wait_for(lambda: not models(server), server)
            for _ in range(PROBES):
                assert server.get("/readyz").status_code == 200
                assert server.get("/version").json() == awake
                assert server.metric("vlsae_ready") == 1
                time.sleep(0.1)
            assert not models(server), "who asks how it is has woken it"
            client = server.client(timeout=PATIENCE_S)
            answer = client.chat.completions.create(model=server.name, **GREEDY)
            assert receipt(answer)["applied"]
            assert answer.system_fingerprint == awake["system_fingerprint"]
            wait_for(lambda: not models(server), server)
            assert server.stop(signal.SIGINT) == 0, server.log()
        finally:
            server.process.kill()
