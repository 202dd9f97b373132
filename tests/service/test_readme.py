"""The examples of the front page and of the service's page, against the real service."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.pages import code_blocks, read
from tests.service.running_server import REPOSITORY, RunningServer, any_engine_will_do

pytestmark = [pytest.mark.service, pytest.mark.slow]


def example(page: str, language: str, server: RunningServer, model: str) -> str:
    """The only example of that language on the page, put to the running server instead of `make serve`'s."""
    [block] = [code for each, code in code_blocks(read(page)) if each == language]
    assert "http://127.0.0.1:8000" in block
    assert model in block
    return block.replace("http://127.0.0.1:8000", server.url).replace(model, model.replace("llava", server.name))


@any_engine_will_do
def test_the_client_example_runs(server: RunningServer, monkeypatch, capsys) -> None:
    code = example("service/README.md", "python", server, 'model="llava"')
    monkeypatch.chdir(REPOSITORY)
    exec(compile(code, "service/README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "'applied': True" in shown
    assert "'strength': 0.8" in shown


@any_engine_will_do
def test_the_curl_command_runs(server: RunningServer) -> None:
    command = example("README.md", "sh", server, '"model": "llava"')
    asked = subprocess.run(["sh", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["choices"][0]["message"]["content"]
    assert (answer["steering"]["applied"], answer["steering"]["strength"]) == (True, 0.8)
