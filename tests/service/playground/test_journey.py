"""The whole journey against the real service with the bundled model: the page in Chromium, and the tutorial."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Page, expect

from service.settings import BUNDLED_MODEL
from tests.pages import FENCED
from tests.service.playground.conftest import CHROMIUM
from tests.service.playground.test_asking import words
from tests.service.running_server import REPOSITORY, RunningServer, start_server

pytestmark = [pytest.mark.service, pytest.mark.slow]
TUTORIAL = REPOSITORY / "service/tutorial.md"
ANSWER_MS = 120_000


class Tutored(NamedTuple):
    """A service that was started as the tutorial says, and where its two files lie."""

    server: RunningServer
    build: Path


@pytest.fixture(scope="module")
def tutored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tutored]:
    build = tmp_path_factory.mktemp("build")
    files = ("--live-file", str(build / "live.json"), "--log-file", str(build / "requests.jsonl"))
    with tempfile.TemporaryDirectory(prefix="srv") as home:
        server = start_server("--model", str(BUNDLED_MODEL), *files, home=Path(home))
        try:
            yield Tutored(server, build)
            assert server.stop(signal.SIGINT) == 0, server.log()
        finally:
            server.process.kill()


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_visitor_s_journey(open_page: Callable[..., Page], tutored: Tutored) -> None:
    """Asks about scenes until steering takes a word away, looks at concepts, removes one, turns the dial to nothing."""
    page = open_page(tutored.server.url)
    expect(page.locator("#status")).to_have_text("llava")
    scenes = page.get_by_role("button", name="A drawing of")
    asked = 0
    while page.locator("#plain mark").count() == 0:
        scenes.nth(asked).click()
        page.locator("#go").click()
        asked += 1
        expect(page.locator("#history-list li")).to_have_count(asked, timeout=ANSWER_MS)
    expect(page.locator("#difference")).to_contain_text("Only plain: ")
    expect(words(page, "plain")).to_contain_text("There is")
    expect(page.locator("#steered .mismatch")).to_contain_text(re.compile(r"0\.\d\d → 0\.\d\d"))
    expect(page.locator("#steered .receipt dl")).to_contain_text("captions")
    assert page.locator(".concept").count() >= 4

    page.get_by_role("button", name=re.compile("^Remove ")).last.click()
    expect(page.locator("#history-list li")).to_have_count(asked + 1, timeout=ANSWER_MS)
    expect(page.locator(".chip")).to_have_count(1)
    page.locator(".chip").click()
    expect(page.locator("#history-list li")).to_have_count(asked + 2, timeout=ANSWER_MS)
    page.get_by_label("Strength").press("Home")
    expect(page.locator("#difference")).to_have_text("Both say the same, word for word.", timeout=ANSWER_MS)


def test_the_tutorial_runs(tutored: Tutored, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Its code, block after block, as it stands there but for the address and the folder."""
    text = TUTORIAL.read_text(encoding="utf-8").replace("build/", f"{tutored.build}/")
    blocks = FENCED.findall(text.replace("http://127.0.0.1:8000", tutored.server.url))
    assert [language for language, _ in blocks] == ["", "python", "python", "python", "python", "sh"]
    monkeypatch.chdir(REPOSITORY)
    namespace: dict = {}
    for language, code in blocks:
        if language == "python":
            exec(compile(code, "service/tutorial.md", "exec"), namespace)
    shown = capsys.readouterr().out
    assert re.search(r"^0  ?There is", shown, re.MULTILINE)
    assert "mismatch {'before': 0." in shown
    assert "without it:  There is" in shown
    environment = {**os.environ, "PATH": f"{REPOSITORY / '.venv/bin'}:{os.environ['PATH']}"}
    command = blocks[-1][1]
    ran = subprocess.run(
        ["sh", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert "experiment worth" in ran.stdout
    feedback = dict(
        re.findall(r"^(plain|steered): share 0\.5, (?:.*\n)+?  feedback +([\d.]+)", ran.stdout, re.MULTILINE)
    )
    assert float(feedback["steered"]) > float(feedback["plain"]), ran.stdout
