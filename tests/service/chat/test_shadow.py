"""Shadows through the whole HTTP side with a scripted model: never shown, measured, and the first to go under load."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from service.chat.shadow import PLACES, compare
from service.errors import ApiError
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.live_settings import LiveSettings
from service.model.object_store import SHADOWS_OF_MEMORY
from service.settings import BUNDLED_ARTIFACT, BUNDLED_MODEL, EngineSettings, Settings
from tests.service.examples import ScriptedModel, body, delta, encoded, end, image_part, picture, user

SETTINGS = Settings(
    model=str(BUNDLED_MODEL), artifact=str(BUNDLED_ARTIFACT), allow_anonymous=True,
    engine=EngineSettings(max_batch_size=16),
)  # fmt: skip
QUIET = 2
"""Requests of callers beside which a shadow may run."""
EXPERIMENT = {
    "name": "strength",
    "arms": [{"name": "control", "weight": 1}],
    "shadow": {"steering": {"preset": "captions", "strength": 0.25}, "share": 1},
}
CHAT = "/v1/chat/completions"


class Model(ScriptedModel):
    """Says one thing to callers and another to shadows, each when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.shadow_says: tuple = (delta(0, "a ring", tokens=3), delta(0, "", finish="stop", tokens=0), end(3))
        self.shadows, self.callers = asyncio.Event(), asyncio.Event()
        self.shadows.set()
        self.callers.set()
        self.shadow_jobs: list = []
        self.ended = 0

    async def generate(self, job):
        is_shadow = job.request_id.startswith("shadow-")
        if is_shadow:
            self.shadow_jobs.append(job)
        try:
            await (self.shadows if is_shadow else self.callers).wait()
            async for event in (ScriptedModel(*self.shadow_says) if is_shadow else super()).generate(job):
                yield event
        finally:
            self.ended += is_shadow


class Service:
    def __init__(self, settings: Settings) -> None:
        self.model, self.live = Model(), LiveSettings(settings)
        self.decoder = ImageDecoder(workers=1, limits=DecoderLimits())
        api = build_api(settings, self.model, self.decoder, live=self.live)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test")
        self.live.change({"experiment": EXPERIMENT})
        assert self.live.describe()["refused"] is None

    async def ask(self, *parts, **fields) -> httpx.Response:
        asked = body(user(*(parts or ("what?",))), model=SETTINGS.model_name, user="visitor", **fields)
        return await self.client.post(CHAT, json=asked)

    async def shadows(self, outcome: str) -> float:
        text = (await self.client.get("/metrics")).text
        sample = f'vlsae_shadow_answers_total{{outcome="{outcome}"}} '
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(sample))

    async def until(self, outcome: str, count: int) -> None:
        deadline = time.monotonic() + 20
        while await self.shadows(outcome) != count:
            assert time.monotonic() < deadline, (outcome, await self.shadows(outcome))
            await asyncio.sleep(0.01)

    async def until_running(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.model.shadow_jobs) - self.model.ended != count:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Service]]:
    started: list[Service] = []

    def build(settings: Settings = SETTINGS) -> Service:
        started.append(Service(settings))
        return started[-1]

    yield build
    for service in started:
        service.decoder.close()
        await service.client.aclose()


@pytest.mark.parametrize("stream", [False, True])
async def test_it_runs_after_the_answer_is_never_shown_and_is_measured(
    start: Callable[..., Service], stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    service = start()
    service.model.shadows.clear()
    with caplog.at_level(logging.INFO, "service.chat.shadow"):
        response = await service.ask(image_part(), "what?", stream=stream)
        await service.until_running(1)
        service.model.shadows.set()
        await service.until("different", 1)
    assert "a star" in response.text
    assert "a ring" not in response.text
    (job,) = service.model.shadow_jobs
    assert (job.steering.settings.strength, job.steering.arm, job.steering.explicit) == (0.25, "shadow", False)
    assert job.images == service.model.jobs[0].images
    (facts,) = [getattr(one, "facts") for one in caplog.records]  # noqa: B009
    assert facts["experiment"]["arm"] == "control"
    assert (facts["same"], facts["shown_tokens"], facts["shadow_tokens"], facts["greedy"]) == (False, 1, 3, False)
    assert facts["similarity"] == 0.5
    assert "star" not in str(facts)
    assert "ring" not in str(facts)


async def test_one_that_agrees_is_counted_as_the_same(start: Callable[..., Service]) -> None:
    service = start()
    service.model.shadow_says = service.model.events
    await service.ask()
    await service.until("same", 1)


async def test_one_that_fails_fails_alone(start: Callable[..., Service]) -> None:
    service = start()
    service.model.shadow_says = (delta(0, "a"), ApiError("engine_unavailable", "lost"))
    response = await service.ask()
    assert response.status_code == 200
    await service.until("failed", 1)


async def test_a_caller_s_own_steering_has_none(start: Callable[..., Service]) -> None:
    service = start()
    await service.ask(steering={"enabled": False})
    await service.ask()
    await service.until("different", 1)
    assert len(service.model.shadow_jobs) == 1


async def test_an_answer_that_fails_has_none(start: Callable[..., Service]) -> None:
    service = start()
    service.model.events = (delta(0, "a"), ApiError("engine_unavailable", "lost"))
    assert (await service.ask()).status_code == 503
    await service.until("dropped", 1)
    assert service.model.shadow_jobs == []


async def test_those_that_run_end_when_callers_need_the_engine(start: Callable[..., Service]) -> None:
    service = start()
    service.model.shadows.clear()
    await service.ask()
    await service.until_running(1)
    service.model.callers.clear()
    asking = [asyncio.create_task(service.ask()) for _ in range(QUIET)]
    await asyncio.sleep(0.2)
    await service.until_running(1)
    asking.append(asyncio.create_task(service.ask()))
    await service.until_running(0)
    service.model.callers.set()
    assert {one.status_code for one in await asyncio.gather(*asking)} == {200}
    assert await service.shadows("dropped") >= 1


async def test_under_load_none_is_even_planned(start: Callable[..., Service]) -> None:
    service = start()
    service.model.callers.clear()
    asking = [asyncio.create_task(service.ask()) for _ in range(20)]
    await asyncio.sleep(0.3)
    service.model.callers.set()
    assert {one.status_code for one in await asyncio.gather(*asking)} == {200}
    deadline = time.monotonic() + 20
    while sum([await service.shadows(one) for one in ("same", "different", "dropped")]) != 20:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert await service.shadows("dropped") >= 20 - PLACES
    assert len(service.model.shadow_jobs) <= PLACES


async def test_places_are_few(start: Callable[..., Service]) -> None:
    service = start()
    service.model.shadows.clear()
    for _ in range(PLACES + 2):
        await service.ask()
    await service.until_running(PLACES)
    assert await service.shadows("dropped") == 2
    service.model.shadows.set()
    await service.until("different", PLACES)
    await service.ask()
    await service.until("different", PLACES + 1)


async def test_memory_is_its_own_and_small(start: Callable[..., Service]) -> None:
    """An image that a caller may send, and a shadow may not hold."""
    side = 512
    limits = {"max_memory_bytes": 3 * side * side * SHADOWS_OF_MEMORY - SHADOWS_OF_MEMORY, "max_body_bytes": 500_000}
    service = start(Settings(**{**SETTINGS.model_dump(), **limits, "max_image_pixels": side * side}))
    large = image_part(encoded(picture(size=(side, side))))
    assert (await service.ask(large, "what?")).status_code == 200
    await service.until("dropped", 1)
    await service.ask(image_part(), "what?")
    await service.until("different", 1)


async def test_only_its_share_has_one(start: Callable[..., Service]) -> None:
    service = start()
    service.live.change({"experiment": {**EXPERIMENT, "shadow": {**EXPERIMENT["shadow"], "share": 1e-9}}})
    for _ in range(20):
        await service.ask()
    assert service.model.shadow_jobs == []
    assert await service.shadows("dropped") == 0


@pytest.mark.parametrize(
    ("shown", "shadow", "same", "similarity"),
    [
        ({0: [1, 2, 3, 4]}, {0: [1, 2, 3, 4]}, True, 1.0),
        ({0: [1, 2, 3, 4]}, {0: [1, 2, 9, 4]}, False, 0.75),
        ({0: [1, 2]}, {}, False, 0.0),
        ({0: [1], 1: [2]}, {0: [1], 1: [3]}, False, 0.5),
        ({}, {}, True, 1.0),
    ],
)
def test_how_far_they_agree(shown: dict, shadow: dict, same: bool, similarity: float) -> None:
    found = compare(shown, shadow)
    assert (found.same, found.similarity) == (same, similarity)
