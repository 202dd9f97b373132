"""A real browser, and the real HTTP side in a thread, with a model behind it that does what a test says."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ApiError
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.model.client import Answer
from service.model.job import ModelJob
from service.settings import BUNDLED_ARTIFACT, Settings
from steering.artifact_config import read_config
from steering.explanation import ConceptActivity, Explanation, Mismatch
from tests.service.examples import ScriptedModel, delta, end

CHROMIUM = shutil.which("chromium") or ""
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)
PLAIN, STEERED = "There is a circle in red, a star in blue.", "There is a circle in red."
CIRCLE, DIAMOND, NAMELESS = 7, 12, 4
"""Concepts of the bundled artifact."""
FINGERPRINT = read_config(BUNDLED_ARTIFACT).fingerprint
MISMATCH = Mismatch(before=0.62, after=0.31)
EXPLANATION = Explanation(
    mismatch=MISMATCH,
    image=(
        ConceptActivity(id=CIRCLE, image=1.4, text=0.9, steered=1.2),
        ConceptActivity(id=NAMELESS, image=0.3, text=0.1, steered=0.2),
    ),
    text=(
        ConceptActivity(id=DIAMOND, image=0.05, text=1.2, steered=0.3),
        ConceptActivity(id=CIRCLE, image=1.4, text=0.9, steered=1.2),
    ),
)
KEY, CHAT_KEY, QUOTA_KEY = "sk-of-the-page", "sk-that-only-chats", "sk-with-a-quota"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium. Gone with the module: while Playwright runs, no test of its thread may have an event loop."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """A page in a browser that remembers nothing; a script that fails, or is refused by the policy, fails the test."""
    contexts, troubles = [], []

    def open_one(url: str, **options: Any) -> Page:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text) if "Content Security" in said.text else None)
        page.goto(url)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert troubles == []


class PacedModel(ScriptedModel):
    """Answers plainly or steered, as it is asked; where `gate` is closed, it stops after `before_gate` words."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.jobs.clear()
        self.texts = {False: PLAIN, True: STEERED}
        self.refusal: ApiError | None = None
        """Raised before the answer."""
        self.error: ApiError | None = None
        """Raised at the gate."""
        self.before_gate = 3
        self.gate = threading.Event()
        self.gate.set()

    async def generate(self, job: ModelJob) -> AsyncGenerator[Answer, None]:
        steered = job.steering.settings.enabled is not False and job.steering.settings.strength != 0
        words = self.texts[steered].split(" ")
        told = {"explanation": [EXPLANATION], "mismatch": [MISMATCH]} if job.steering.settings.explain else {}
        last = (delta(0, "", finish="stop", tokens=0), end(len(words), applied=steered, artifact=FINGERPRINT, **told))
        script = ScriptedModel(*(delta(0, f" {word}") for word in words), *last)
        self.jobs.append(job)
        if self.refusal is not None:
            raise self.refusal
        passed = 0
        async for event in script.generate(job):
            if passed > self.before_gate:
                while not self.gate.is_set():
                    await asyncio.sleep(0.01)
                if self.error is not None:
                    raise self.error
            passed += 1
            yield event


class Breakable:
    """ASGI middleware: while `broken`, an answer's connection is lost where its next piece should come."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.broken = app, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def breaking_send(message: Message) -> None:
            if self.broken and scope["path"] == "/v1/chat/completions" and message["type"] == "http.response.body":
                raise ConnectionResetError
            await send(message)

        with suppress(ConnectionResetError):  # as if the process were gone: uvicorn then cuts the connection
            await self.app(scope, receive, breaking_send)


class PageServer:
    """The HTTP side with these settings, on loopback, until it is closed."""

    def __init__(self, **settings: Any) -> None:
        self.model, self.decoder = PacedModel(), ImageDecoder(workers=1, limits=DecoderLimits())
        options = {"model": "/models/tiny", "artifact": str(BUNDLED_ARTIFACT), **settings}
        api = build_api(Settings(**options), self.model, self.decoder)
        self.lines = Breakable(api)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._server = uvicorn.Server(uvicorn.Config(self.lines, log_level="critical", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()

    def close(self) -> None:
        self.model.gate.set()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self.decoder.close()


@pytest.fixture(scope="module")
def keyless_front() -> Iterator[PageServer]:
    """Asks for no key."""
    running = PageServer(allow_anonymous=True)
    yield running
    running.close()


@pytest.fixture
def front(keyless_front: PageServer) -> Iterator[PageServer]:
    """As new."""
    keyless_front.model.reset()
    keyless_front.lines.broken = False
    yield keyless_front
    keyless_front.model.gate.set()


@pytest.fixture(scope="module")
def keyed_front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    """Asks for KEY; CHAT_KEY is not told of concepts, and QUOTA_KEY good for one request a minute."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = [
        {"name": "page", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "scopes": ["chat", "explain"]},
        {"name": "chat", "sha256": hashlib.sha256(CHAT_KEY.encode()).hexdigest(), "scopes": ["chat"]},
        {"name": "little", "sha256": hashlib.sha256(QUOTA_KEY.encode()).hexdigest(), "scopes": ["chat", "explain"],
         "quota": {"requests_per_minute": 1}},
    ]  # fmt: skip
    file.write_text(json.dumps({"keys": keys}))
    running = PageServer(keys_file=str(file))
    yield running
    running.close()
