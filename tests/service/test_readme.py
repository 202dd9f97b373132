"""The README's client example, against the real service."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.service.running_server import REPOSITORY, RunningServer
from tests.tiny_models import drawn_image

pytestmark = [pytest.mark.service, pytest.mark.slow]


def test_the_client_example_runs(server: RunningServer, tmp_path: Path, monkeypatch, capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "OpenAI(" in block)
    assert 'model="llava"' in example
    example = example.replace("http://127.0.0.1:8000", server.url).replace('model="llava"', f'model="{server.name}"')
    drawn_image(1, (48, 48)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "'applied': True" in shown
    assert "'strength': 0.8" in shown
