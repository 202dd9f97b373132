"""`/v1/concepts` in process, on the bundled artifact: pages, caching, pictures, searches, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from service.callers.key_file import Key, KeyFile, Quota, Scope
from service.http.api import build_api
from service.http.concepts.contract import ConceptAnswer, ConceptPage, FoundConcepts
from service.images.decoder import DecoderLimits, ImageDecoder
from service.settings import BUNDLED_ARTIFACT, KEYS_VARIABLE, Settings
from steering.concepts import read_concepts
from steering.explanation import ConceptActivity, Explanation, Mismatch
from tests.service.examples import ScriptedModel, data_url, delta, encoded, end, picture

CONCEPTS = "/v1/concepts"
SEARCH = f"{CONCEPTS}/search"
SEEN = (ConceptActivity(id=17, image=1.4, text=0.0, steered=0.0), ConceptActivity(id=4, image=0.9, text=0, steered=0))
EXPLAINED = Explanation(mismatch=Mismatch(before=0.5, after=0.5), image=SEEN, text=())


class Service:
    """The API on an artifact; a client that may have a key."""

    def __init__(self, artifact: Path | None) -> None:
        settings = Settings(
            model="/models/tiny",
            artifact=artifact and str(artifact),
            steering="on" if artifact else "off",
            allow_anonymous=True,
            max_body_bytes=100_000,
        )
        self.model = ScriptedModel(delta(0, "a", finish="length"), end(1, explanation=[EXPLAINED]))
        self.decoder = ImageDecoder(workers=1, limits=DecoderLimits())
        api = build_api(settings, self.model, self.decoder)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test")

    async def get(self, path: str = "", **headers: str) -> httpx.Response:
        return await self.client.get(CONCEPTS + path, headers=headers)

    async def search(self, body: object, **headers: str) -> httpx.Response:
        return await self.client.post(SEARCH, json=body, headers=headers)


@pytest.fixture
async def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Service]]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    services = []

    def start(artifact: Path | None = BUNDLED_ARTIFACT) -> Service:
        services.append(Service(artifact))
        return services[-1]

    yield start
    for service in services:
        service.decoder.close()
        await service.client.aclose()


@pytest.fixture
def service(serve) -> Service:
    return serve()


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


async def test_all_pages_are_all_concepts(service: Service) -> None:
    found, after, more = [], "", True
    while more:
        page = ConceptPage.model_validate_json((await service.get(f"?limit=100{after}")).content)
        assert page.last_id == page.data[-1].id
        found, after, more = found + page.data, f"&after={page.last_id}", page.has_more
    stored = list(read_concepts(BUNDLED_ARTIFACT, thumbnails=False))
    assert [(one.id, one.label, one.texts, one.mean_activation) for one in found] == [
        (one["id"], one["label"], one["texts"], one["mean_activation"]) for one in stored
    ]
    assert (await service.get("?after=999999999")).json() == {
        "object": "list", "data": [], "has_more": False, "last_id": None,
    }  # fmt: skip


async def test_words_choose(service: Service) -> None:
    page = (await service.get("?q=star%20red&limit=5")).json()
    assert len(page["data"]) == 5
    for concept in page["data"]:
        assert "star" in (text := " ".join([concept["label"], *concept["texts"]]))
        assert "red" in text


async def test_one_is_sent_once(service: Service) -> None:
    first = await service.get("/17")
    assert ConceptAnswer.model_validate_json(first.content).id == 17
    assert first.headers["cache-control"] == "private, no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        again = await service.get("/17", **{"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert (await service.get("/18", **{"if-none-match": tag})).status_code == 200
    assert (
        await service.get("?limit=1", **{"if-none-match": (await service.get("?limit=1")).headers["etag"]})
    ).status_code == 304


async def test_a_thumbnail_may_be_kept_as_long_as_it_is_the_same(service: Service) -> None:
    path = (await service.get("/17")).json()["images"][1]["thumbnail"].removeprefix(CONCEPTS)
    shown = await service.get(path)
    assert (shown.status_code, shown.headers["content-type"]) == (200, "image/jpeg")
    assert shown.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert shown.headers["x-content-type-options"] == "nosniff"
    other = await service.get("/17/thumbnails/1?v=old")
    assert (other.content, other.headers["cache-control"]) == (shown.content, "private, no-cache")
    assert (await service.get(path, **{"if-none-match": shown.headers["etag"]})).status_code == 304


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/5000", (404, "concept_not_found", None)),
        ("/17/thumbnails/9", (404, "concept_not_found", None)),
        ("/5000/thumbnails/0", (404, "concept_not_found", None)),
        ("/star", (404, "route_not_found", None)),
        ("/-1", (404, "route_not_found", None)),
        (f"/{'9' * 5000}", (404, "route_not_found", None)),
        ("/17/thumbnails/..%2f..%2fconfig.json", (404, "route_not_found", None)),
        ("/search", (405, "method_not_allowed", None)),
        ("?limit=0", (400, "invalid_value", "limit")),
        ("?limit=101", (400, "invalid_value", "limit")),
        ("?limit=1.0", (400, "invalid_value", "limit")),
        ("?limit=", (400, "invalid_value", "limit")),
        ("?limit=%D9%A1", (400, "invalid_value", "limit")),
        (f"?after={'9' * 5000}", (400, "invalid_value", "after")),
        (f"?q={'x' * 257}", (400, "invalid_value", "q")),
        ("?limit=1&limit=2", (400, "invalid_value", None)),
        ("?lmit=1", (400, "unknown_field", "lmit")),
    ],
)
async def test_what_is_refused(service: Service, path: str, error: tuple) -> None:
    assert error_of(await service.get(path)) == error


async def test_a_service_without_an_artifact_has_none(serve) -> None:
    service = serve(None)
    for response in (await service.get(), await service.get("/1"), await service.search({"text": "a"})):
        assert error_of(response) == (404, "concept_not_found", None)
        assert "no artifact" in response.json()["error"]["message"]


async def test_an_exchanged_picture_is_not_shown(serve, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(BUNDLED_ARTIFACT, artifact)
    service = serve(artifact)
    assert (await service.get("/17/thumbnails/0")).status_code == 200
    [file] = (artifact / "thumbnails").glob("17-*.json")
    file.write_text(json.dumps([data_url(encoded(picture()))] * 3))
    refused = await service.get("/17/thumbnails/0")
    assert error_of(refused) == (503, "bad_artifact", None)
    assert str(tmp_path) not in refused.text
    shutil.rmtree(artifact / "thumbnails")
    assert [image["thumbnail"] for image in (await service.get("/17")).json()["images"]] == [None] * 3


async def test_a_text_finds_concepts(service: Service) -> None:
    label = (await service.get("/3")).json()["label"]
    found = FoundConcepts.model_validate_json((await service.search({"text": label, "limit": 3})).content)
    assert {one.id for one in found.data} > {3, 378}, "the two labels with all these words"
    assert [one.score for one in found.data] == sorted((one.score for one in found.data), reverse=True)
    assert (await service.search({"text": "~"})).json() == {"object": "list", "data": []}
    assert service.model.jobs == [], "no model is asked"


async def test_a_picture_finds_what_it_holds(service: Service) -> None:
    url = data_url(encoded(picture()))
    found = FoundConcepts.model_validate_json((await service.search({"image_url": {"url": url}})).content)
    assert [(one.id, one.score) for one in found.data] == [(17, 1.4), (4, 0.9)]
    assert found.data[0].label == (await service.get("/17")).json()["label"]
    (job,) = service.model.jobs
    assert (len(job.images), job.max_tokens, job.steering.settings.enabled, job.steering.settings.explain) == (
        1, 1, False, "answer",
    )  # fmt: skip
    assert len((await service.search({"image_url": {"url": url}, "limit": 1})).json()["data"]) == 1
    metrics = (await service.client.get("/metrics")).text
    assert "vlsae_images_total 2.0" in metrics
    assert "vlsae_requests_in_progress 0.0" in metrics


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, (400, "missing_field", "text")),
        ([], (400, "invalid_value", None)),
        ({"text": ""}, (400, "invalid_value", "text")),
        ({"text": "x" * 1001}, (400, "invalid_value", "text")),
        ({"text": "a", "limit": 101}, (400, "invalid_value", "limit")),
        ({"text": "a", "image_url": {"url": "data:"}}, (400, "unknown_field", "text")),
        ({"image_url": {"url": "https://a.example/a.png"}}, (400, "invalid_image", "image_url.url")),
        ({"image_url": {"url": "data:image/png;base64,AAAA"}}, (400, "invalid_image", "image_url.url")),
        ({"image_url": {"url": "data:image/svg+xml;base64,AAAA"}}, (400, "invalid_image", "image_url.url")),
        ({"image_url": {"url": data_url(encoded(picture(size=(2, 2))))}}, (400, "invalid_image", "image_url.url")),
        ({"image_url": {"url": data_url(encoded(picture()))}, "limit": 11}, (400, "invalid_value", "limit")),
        ({"image_url": {"url": "data:image/png;base64," + "A" * 100_000}}, (413, "request_too_large", None)),
    ],
)
async def test_searches_that_are_refused(service: Service, body: object, error: tuple) -> None:
    assert error_of(await service.search(body)) == error
    assert service.model.jobs == []


def keys(**scopes: tuple[Scope, ...]) -> str:
    """Each key is its own name."""
    digest = {name: hashlib.sha256(name.encode()).hexdigest() for name in scopes}
    made = tuple(
        Key(name=name, sha256=digest[name], scopes=frozenset(held), quota=Quota(images_per_minute=1))
        for name, held in scopes.items()
    )
    return KeyFile(keys=made).model_dump_json()


async def test_scopes_and_quotas(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, keys(chats=("chat",), explains=("explain",), both=("chat", "explain")))
    service = serve()
    chats, explains, both = ({"authorization": f"Bearer {name}"} for name in ("chats", "explains", "both"))
    for path in ("", "/17", "/17/thumbnails/0"):
        assert error_of(await service.get(path)) == (401, "invalid_api_key", None)
        assert error_of(await service.get(path, **chats)) == (403, "permission_denied", None)
        assert (await service.get(path, **explains)).status_code == 200
    image = {"image_url": {"url": data_url(encoded(picture()))}}
    assert (await service.search({"text": "star"}, **explains)).status_code == 200
    assert error_of(await service.search(image, **explains)) == (403, "permission_denied", None)
    assert (await service.search(image, **both)).status_code == 200
    assert error_of(await service.search(image, **both)) == (429, "rate_limit_exceeded", None)
    assert len(service.model.jobs) == 1
