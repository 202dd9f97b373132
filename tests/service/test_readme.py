"""The README's client example, against the real service."""

from __future__ import annotations

import re

import pytest

from tests.service.running_server import REPOSITORY, RunningServer, any_engine_will_do

pytestmark = [pytest.mark.service, pytest.mark.slow]


@any_engine_will_do
def test_the_client_example_runs(server: RunningServer, monkeypatch, capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "OpenAI(" in block)
    assert 'model="llava"' in example
    example = example.replace("http://127.0.0.1:8000", server.url).replace('model="llava"', f'model="{server.name}"')
    monkeypatch.chdir(REPOSITORY)
    exec(compile(example, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "'applied': True" in shown
    assert "'strength': 0.8" in shown
