"""Keys before every route, scopes, quotas, slow bodies and feedback: the API in process, over a scripted model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from service.callers.ledger import Ledger
from service.errors import ApiError
from service.http import feedback_route
from service.http.api import build_api
from service.http.routes import ROUTES
from service.images.decoder import DecoderLimits, ImageDecoder
from service.metrics.exposition import Metrics
from service.settings import BUNDLED_ARTIFACT, Settings
from tests.service.callers.test_ledger import Clock
from tests.service.examples import ScriptedModel, body, delta, encoded, end, image_part, picture, user

CHAT, FEEDBACK = "/v1/chat/completions", "/v1/feedback"
PUBLIC = {"/healthz", "/readyz", "/openapi.json", "/", "/playground/{file:path}"}
SCOPES = {CHAT: "chat", FEEDBACK: "chat", "/v1/models": "chat", "/version": "chat", "/metrics": "metrics"}
JSON_BODY = {"content-type": "application/json"}


class Service:
    """The API with keys, a ledger whose time is ours, and a client per key."""

    def __init__(self, folder: Path, ledger: Ledger | None = None, **settings: Any) -> None:
        keys: list[dict[str, Any]] = [
            {"name": "chatter", "scopes": ["chat"], "quota": {"requests_per_minute": 1000}},
            {"name": "other", "scopes": ["chat"]},
            {"name": "scraper", "scopes": ["metrics"]},
            {"name": "tester", "scopes": ["chat", "evaluate"]},
            {"name": "explainer", "scopes": ["explain"]},
            {"name": "limited", "scopes": ["chat"], "quota": {"requests_per_minute": 2}},
            {"name": "pictures", "scopes": ["chat"], "quota": {"images_per_minute": 3, "pixels_per_minute": 4000}},
        ]
        file = folder / "keys.json"
        for key in keys:
            key["sha256"] = hashlib.sha256(secret(key["name"]).encode()).hexdigest()
        file.write_text(json.dumps({"keys": keys}))
        self.clock, self.model = Clock(), ScriptedModel()
        self.ledger = ledger or Ledger(clock=self.clock)
        self.decoder = ImageDecoder(workers=1, limits=DecoderLimits())
        options = {"model": "/models/tiny", "artifact": str(BUNDLED_ARTIFACT), "keys_file": str(file), **settings}
        self.api = build_api(Settings(**options), self.model, self.decoder, ledger=self.ledger)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.api), base_url="http://test")

    async def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        headers = {**({"authorization": f"Bearer {secret(key)}"} if key else {}), **options.pop("headers", {})}
        return await self.http.request(method, path, headers=headers, **options)

    async def chat(self, key: str | None, *messages: dict, **fields: Any) -> httpx.Response:
        return await self.ask("POST", CHAT, key, json=body(*messages, **fields))


def secret(name: str) -> str:
    """The key of that name."""
    return f"vlsae-{name}"


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator:
    services = []

    def build(**settings: Any) -> Service:
        services.append(Service(tmp_path, **settings))
        return services[-1]

    yield build
    for service in services:
        service.decoder.close()
        await service.http.aclose()


@pytest.fixture
def service(start) -> Service:
    return start()


def code_of(response: httpx.Response) -> str:
    return response.json()["error"]["code"]


def metric_of(service: Service, name: str, **labels: str) -> float:
    """A sample that the service counted."""
    [metrics] = [one.kwargs["metrics"] for one in service.api.user_middleware if "metrics" in one.kwargs]
    assert isinstance(metrics, Metrics)
    return metrics.registry.get_sample_value(name, labels) or 0.0


def test_every_route_says_who_may_ask(service: Service) -> None:
    paths = {route.path for route in service.api.routes if isinstance(route, Route)}
    assert len(paths) == len(service.api.routes), "no sockets, no mounts"
    assert paths == {route.path for route in ROUTES}
    assert {route.path for route in ROUTES if route.scope is None} == PUBLIC


async def test_a_route_that_says_nothing_is_not_reachable(service: Service) -> None:
    @service.api.get("/forgotten")
    async def forgotten() -> str:
        pytest.fail("it was reached")

    assert (await service.ask("GET", "/forgotten")).status_code == 401
    assert (await service.ask("GET", "/forgotten", "other")).status_code == 404


@pytest.mark.parametrize(
    "path", [*SCOPES, "/v1/models/tiny", "/v1/models/", "/nowhere", "/playground", "/docs", "/healthz/"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
async def test_without_a_key_only_public_paths_answer(service: Service, path: str, method: str) -> None:
    """Nor is it told which others exist."""
    refused = await service.ask(method, path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    if method != "HEAD":
        assert code_of(refused) == "invalid_api_key"
    assert service.model.jobs == []


@pytest.mark.parametrize("path", sorted(PUBLIC))
async def test_public_paths_need_no_key(service: Service, path: str) -> None:
    path = path.replace("{file:path}", "page.css")
    assert (await service.ask("GET", path)).status_code == 200
    assert (await service.ask("GET", path, headers={"authorization": "Bearer wrong"})).status_code == 200


@pytest.mark.parametrize("path", [*SCOPES, "/v1/models/tiny"])
async def test_every_other_path_needs_its_scope(service: Service, path: str) -> None:
    """With the scope a request gets as far as the route's own checks."""
    for name, scopes in (("other", {"chat"}), ("scraper", {"metrics"})):
        for method in ("GET", "POST"):
            answer = await service.ask(method, path, name, json={})
            if SCOPES.get(path, "chat") in scopes:
                assert answer.status_code in (200, 400, 405)
            else:
                assert (answer.status_code, code_of(answer)) == (403, "permission_denied")
    assert service.model.jobs == []


@pytest.mark.parametrize("path", ["/nowhere", "/docs", "/healthz/", "/v1", "/metrics/"])
async def test_with_a_key_a_path_that_does_not_exist_is_404(service: Service, path: str) -> None:
    answer = await service.ask("GET", path, "other")
    assert (answer.status_code, code_of(answer)) == (404, "route_not_found")


@pytest.mark.parametrize(
    "header",
    [
        "vlsae-other", "Bearer", "Bearer ", "Basic vlsae-other", "Bearer vlsae-other x", "Bearer vlsae-othe",
        "Bearer vlsae-OTHER", "Bearer vlsae-other,", "Bearer " + "x" * 2000, "Bearervlsae-other", "Bearer \xe9",
    ],
)  # fmt: skip
async def test_keys_are_not_guessed_at(service: Service, header: str) -> None:
    headers = [(b"authorization", header.encode("latin-1"))]
    assert (await service.http.get("/version", headers=headers)).status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   "])
async def test_the_scheme_is_read_as_http_says(service: Service, scheme: str) -> None:
    assert (
        await service.ask("GET", "/version", headers={"authorization": scheme + secret("other")})
    ).status_code == 200


async def test_one_request_has_one_key(service: Service) -> None:
    twice = [("authorization", f"Bearer {secret(name)}") for name in ("other", "tester")]
    assert (await service.http.get("/version", headers=twice)).status_code == 401


async def test_a_refused_body_is_not_read(service: Service) -> None:
    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    for key, status in ((None, 401), ("scraper", 403)):
        assert (await service.ask("POST", CHAT, key, content=never(), headers=JSON_BODY)).status_code == status


async def test_callers_are_tenants(service: Service) -> None:
    for name in ("chatter", "other"):
        assert (await service.chat(name)).status_code == 200
    assert [job.tenant for job in service.model.jobs] == ["chatter", "other"]


async def test_controls_need_a_scope_besides_the_setting(start) -> None:
    asked = {"steering": {"control": "random"}}
    closed, opened = start(), start(allow_controls=True)
    assert code_of(await closed.chat("tester", **asked)) == "unsupported_value"
    assert code_of(await opened.chat("other", **asked)) == "permission_denied"
    assert (await opened.chat("other", steering={"control": "none"})).status_code == 200
    assert (await opened.chat("tester", **asked)).status_code == 200


async def test_requests_have_a_quota_and_the_wait_is_exact(service: Service) -> None:
    assert [(await service.chat("limited")).status_code for _ in range(2)] == [200, 200]
    service.clock.now += 10.5
    refused = await service.ask("GET", "/v1/models", "limited")
    assert (refused.status_code, code_of(refused)) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "20", "19.5 s, rounded up"
    assert "2 requests a minute" in refused.json()["error"]["message"]
    assert (await service.ask("GET", "/healthz", "limited")).status_code == 200
    assert (await service.chat("other")).status_code == 200
    service.clock.now += 20
    assert (await service.chat("limited")).status_code == 200


async def test_refused_requests_are_charged_too(service: Service) -> None:
    asked = [await service.ask("GET", path, "limited") for path in ("/no/such/path", "/metrics", "/v1/models")]
    assert [answer.status_code for answer in asked] == [404, 403, 429]


async def test_a_spent_quota_is_said_before_the_body_is_read(service: Service) -> None:
    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    for _ in range(2):
        await service.ask("GET", "/v1/models", "limited")
    assert (await service.ask("POST", CHAT, "limited", content=never(), headers=JSON_BODY)).status_code == 429


async def test_images_and_pixels_have_quotas(service: Service) -> None:
    part = image_part(encoded(picture(size=(32, 32))))
    assert (await service.chat("pictures", user(part, part, "?"))).status_code == 200
    refused = await service.chat("pictures", user(part, part, "?"))
    assert (refused.status_code, code_of(refused)) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "20", "one image of three a minute is left, two are asked for"
    assert "3 images a minute" in refused.json()["error"]["message"]
    assert len(service.model.jobs) == 1
    large = image_part(encoded(picture(size=(40, 40))))
    refused = await service.chat("pictures", user(large, "?"))
    assert refused.status_code == 200, "the images of a refused request were not used up"
    refused = await service.chat("pictures", user(image_part(encoded(picture(size=(36, 36)))), "?"))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "20")
    service.clock.now += 20
    assert (await service.chat("pictures", user("no image"))).status_code == 200
    assert (await service.chat("pictures", user(part, "?"))).status_code == 200


@pytest.mark.parametrize(("side", "count", "what"), [(64, 1, "4096 pixels .* 4000"), (8, 4, "4 images .* 3")])
async def test_what_no_waiting_would_allow_is_no_matter_of_waiting(
    service: Service, side: int, count: int, what: str
) -> None:
    part = image_part(encoded(picture(size=(side, side))))
    refused = await service.chat("pictures", user(*[part] * count, "?"))
    assert (refused.status_code, code_of(refused)) == (413, "request_too_large")
    assert re.search(what, refused.json()["error"]["message"])
    assert (await service.chat("pictures", user(image_part(), "?"))).status_code == 200, "and nothing was used"


class LostLedger(Ledger):
    """One whose process cannot be reached."""

    async def charge(self, caller, charges):
        raise ApiError("engine_unavailable", "the ledger of quotas does not answer; try again later")

    async def record_answer(self, answer_id, caller, labels):
        await self.charge(caller, ())

    async def claim_answer(self, answer_id, caller):
        return await self.charge(caller, ())


async def test_without_a_ledger_nothing_goes_unmetered(start) -> None:
    service = start(ledger=LostLedger())
    refused = await service.chat("limited")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    refused = await service.chat("pictures", user(image_part(), "?"))
    assert refused.status_code == 503
    assert service.model.jobs == []
    assert (await service.chat("other")).status_code == 200, "a key without a quota needs no ledger for an answer"
    refused = await service.ask("POST", FEEDBACK, "other", json={"request_id": "chatcmpl-1", "score": 1})
    assert refused.status_code == 503


@pytest.mark.parametrize("path", [CHAT, FEEDBACK])
async def test_a_body_that_trickles_is_given_up(start, path: str) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    service = start(body_timeout_s=0.2)
    refused = await service.ask("POST", path, "other", content=endless(), headers=JSON_BODY)
    assert (refused.status_code, code_of(refused)) == (408, "body_timeout")
    assert (await service.chat("other")).status_code == 200


async def answered(service: Service, key: str, **fields: Any) -> str:
    """The id of a new answer."""
    answer = await service.chat(key, **fields)
    if not fields.get("stream"):
        return answer.json()["id"]
    return json.loads(answer.text.partition("data: ")[2].partition("\n")[0])["id"]


async def rate(service: Service, key: str, request_id: str, score: float = 1) -> httpx.Response:
    return await service.ask("POST", FEEDBACK, key, json={"request_id": request_id, "score": score})


@pytest.mark.parametrize("stream", [False, True])
async def test_feedback_is_counted_by_what_was_done(service: Service, stream: bool, caplog) -> None:
    labels = {"arm": "none", "preset": "captions", "strength": "1", "applied": "true"}
    request_id = await answered(service, "other", stream=stream)
    with caplog.at_level("INFO", "service.http.feedback_route"):
        given = await rate(service, "other", request_id, 0.25)
    assert given.json() == {"object": "feedback", "request_id": request_id, "score": 0.25}
    assert metric_of(service, "vlsae_feedback_score_ratio_sum", **labels) == 0.25
    assert metric_of(service, "vlsae_feedback_score_ratio_count", **labels) == 1
    [line] = [one for one in caplog.records if one.name == "service.http.feedback_route"]  # others may warn meanwhile
    assert line.facts == {"completion_id": request_id, "key": "other", "score": 0.25, **labels}
    again = await rate(service, "other", request_id)
    assert (again.status_code, code_of(again)) == (404, "request_not_found")
    assert metric_of(service, "vlsae_feedback_score_ratio_count", **labels) == 1


@pytest.mark.parametrize(
    ("receipt", "labels"),
    [
        ({"strength": 0.0, "applied": False}, {"strength": "0", "applied": "false"}),
        ({"strength": None, "preset": None, "applied": False}, {"strength": "0", "preset": "none", "applied": "false"}),
        ({"strength": 0.1}, {"strength": "0.25"}),
        ({"strength": 0.25}, {"strength": "0.25"}),
        ({"strength": 0.500001}, {"strength": "0.75"}),
        ({"strength": 1.0, "preset": "questions"}, {"strength": "1", "preset": "questions"}),
    ],
)
async def test_strengths_are_counted_in_ranges(service: Service, receipt: dict, labels: dict) -> None:
    service.model.events = (delta(0, "a", finish="stop"), end(1, **receipt))
    assert (await rate(service, "other", await answered(service, "other"))).status_code == 200
    expected = {"arm": "none", "preset": "captions", "applied": "true", **labels}
    assert metric_of(service, "vlsae_feedback_score_ratio_count", **expected) == 1


async def test_feedback_on_what_others_were_told_is_feedback_on_nothing(service: Service) -> None:
    request_id = await answered(service, "other")
    told = [(await rate(service, "tester", named)).json() for named in (request_id, "chatcmpl-nobody-was-told")]
    assert told[0] == told[1]
    assert told[0]["error"]["code"] == "request_not_found"
    assert (await rate(service, "other", request_id)).status_code == 200


async def test_an_answer_that_failed_awaits_no_feedback(service: Service) -> None:
    service.model.events = (delta(0, "a"), ApiError("engine_unavailable", "lost"))
    request_id = await answered(service, "other", stream=True)
    assert (await rate(service, "other", request_id)).status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"score": 1}, "request_id"),
        ({"request_id": "a"}, "score"),
        ({"request_id": "a", "score": 1.01}, "score"),
        ({"request_id": "a", "score": "1"}, "score"),
        ({"request_id": "a", "score": True}, "score"),
        ({"request_id": 7, "score": 1}, "request_id"),
        ({"request_id": "a", "score": 1, "rating": 1}, "rating"),
    ],
)
async def test_wrong_feedback_is_named(service: Service, fields: dict, param: str) -> None:
    refused = await service.ask("POST", FEEDBACK, "other", json=fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_slow_senders_of_feedback_do_not_take_every_place(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback_route, "MAX_AT_ONCE", 2)
    release = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        await release.wait()
        yield b"{}"

    service = start()
    busy = []
    for name in ("other", "chatter"):
        busy.append(asyncio.create_task(service.ask("POST", FEEDBACK, name, content=slow(), headers=JSON_BODY)))
        await asyncio.sleep(0.1)
        assert code_of(await rate(service, "other", "a")) == "overloaded"
        assert (await rate(service, "limited", "a")).status_code == (404 if name == "other" else 503)
    release.set()
    assert {(await one).status_code for one in busy} == {400}
    assert (await rate(service, "other", "a")).status_code == 404, "places are given back"
