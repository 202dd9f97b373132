"""The playground's files over HTTP, in process: headers, copies that are still good, nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from service.http.api import build_api
from service.http.pages.playground import FOLDER, HEADERS, MEDIA_TYPES, Playground
from service.images.decoder import DecoderLimits, ImageDecoder
from service.settings import Settings
from tests.service.examples import ScriptedModel
from tests.service.playground.scenes import INTO, bundled, write

FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())
SOURCES = [name for name in FILES if name.endswith((".html", ".css", ".js", ".svg"))]


@pytest.fixture(scope="module")
def api() -> Iterator[FastAPI]:
    decoder = ImageDecoder(workers=1, limits=DecoderLimits())
    settings = Settings(model="/models/tiny", artifact="/a", allow_anonymous=True, only_local_names=True)
    yield build_api(settings, ScriptedModel(), decoder)
    decoder.close()


@pytest.fixture
async def client(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://localhost") as client:
        yield client


def test_every_file_is_one_that_is_served() -> None:
    assert set(Playground().names) == set(FILES) - {"index.html"}


async def test_the_page_may_load_what_is_the_service_s_own_and_nothing_else(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert {name: value for name, value in policy.items() if value != "'none'"} == {
        "script-src": "'self'", "style-src": "'self'", "img-src": "'self' data: blob:", "connect-src": "'self'",
        "require-trusted-types-for": "'script'",
    }  # fmt: skip
    assert {"default-src", "form-action", "frame-ancestors", "base-uri", "trusted-types"} <= set(policy)
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("name", [name for name in FILES if name != "index.html"])
async def test_every_part_says_what_it_is_and_is_sent_once(client: httpx.AsyncClient, name: str) -> None:
    path = f"/playground/{name}"
    first = await client.get(path)
    assert (first.status_code, first.content) == (200, (FOLDER / name).read_bytes())
    assert first.headers["content-type"] == MEDIA_TYPES["." + name.rpartition(".")[2]]
    assert HEADERS.items() <= dict(first.headers).items()
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = await client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert (await client.get(path, headers={"if-none-match": '"other"'})).status_code == 200


@pytest.mark.parametrize(
    "name", ["", "nothing.js", "../app.py", "..%2Fapp.py", "%2E%2E/settings.py", "scripts", "index.html"]
)
async def test_nothing_else_is_served(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get(f"/playground/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found")


async def test_a_name_that_was_made_to_lead_here_gets_no_page(client: httpx.AsyncClient) -> None:
    assert (await client.get("/", headers={"host": "elsewhere.example"})).status_code == 400


@pytest.mark.parametrize("name", SOURCES)
def test_a_part_is_short_and_asks_nobody_else(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://127.0.0.1:8000/"}
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not re.search(r"\bstyle=|<style|\son[a-z]+=\"|<script(?![^>]*\bsrc=)", text)


def test_the_scenes_are_drawn_from_their_seeds(tmp_path) -> None:
    """The same pixels, not the same bytes: compression changes between versions of its library."""
    write(tmp_path)
    assert (tmp_path / "scenes.json").read_text() == (INTO / "scenes.json").read_text()
    for name, (picture, _) in bundled().items():
        assert np.array_equal(np.asarray(Image.open(INTO / name)), np.asarray(picture)), name
