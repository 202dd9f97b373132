"""Who asks how the model is, and how often, is no work for it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, cast

import httpx
import pytest

from service.artifacts import MAIN
from service.errors import ApiError
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.model.job import ModelJob
from service.model.presence import Presence
from service.model.readiness import FRESH_S, Readiness, Recent
from service.model.replica import ModelStatus
from service.settings import Settings
from steering.engines.base import Health
from tests.service.examples import ScriptedModel


class AskedModel(ScriptedModel):
    """Counts who asks for its status, and answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def status(self, artifact: str = MAIN) -> ModelStatus:
        self.asked += 1
        await self.may_answer.wait()
        return await super().status(artifact)


async def test_any_number_of_probes_is_one_call() -> None:
    model = AskedModel()
    decoder = ImageDecoder(workers=1, limits=DecoderLimits(timeout_s=1, max_side=99))
    api = build_api(Settings(model="/models/tiny", artifact="/a", allow_anonymous=True), model, decoder)
    model.may_answer.clear()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test") as client:
        paths = ("/readyz", "/version", "/metrics") * 10
        asking = [asyncio.create_task(client.get(path)) for path in paths]
        while not model.asked:
            await asyncio.sleep(0)
        asking[0].cancel()
        await asyncio.sleep(0)
        model.may_answer.set()
        answers = await asyncio.gather(*asking[1:])
    decoder.close()
    assert {answer.status_code for answer in answers} == {200}, "though who asked first has left"
    assert model.asked == 1


async def test_nobody_waits_for_a_model_that_was_asked_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.model.readiness.FRESH_S", 0.0)
    model = AskedModel()
    look = Recent(model.status)
    model.health = ApiError("engine_unavailable", "stalled")
    with suppress(ApiError):
        await look.look()
    model.may_answer.clear()
    first = asyncio.create_task(look.look())
    while model.asked < 2:
        await asyncio.sleep(0)
    model.health = ScriptedModel().health
    with pytest.raises(ApiError, match="stalled"):
        await look.look()
    monkeypatch.setattr("service.model.readiness.PATIENCE_S", 0.0)
    late = asyncio.create_task(look.look())
    await asyncio.sleep(0)
    assert not late.done()
    model.may_answer.set()
    assert (await first).health == (await late).health == model.health
    assert model.asked == 2


async def test_what_was_found_is_not_kept_long(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AskedModel()
    look = Recent(model.status)
    await look.look()
    await look.look()
    assert model.asked == 1
    monkeypatch.setattr("service.model.readiness.FRESH_S", 0.0)
    await look.look()
    assert model.asked == 2


async def test_a_model_that_may_sleep_is_asked_only_while_it_works_for_us() -> None:
    """Asking is load: an idle one would never go."""
    model = AskedModel()
    readiness = Readiness(model, may_sleep=True)
    assert await readiness.check() == {"status": "ready"}
    assert model.asked == 0
    answer = model.generate(cast(ModelJob, None))
    await anext(answer)
    assert await readiness.check() == {"status": "ready", "running": 0, "waiting": 0}
    assert model.asked == 1
    model.health = Health(alive=True, running=1, waiting=0, seconds_since_progress=61.0)
    await asyncio.sleep(FRESH_S)
    with pytest.raises(ApiError, match="no progress"):
        await readiness.check()
    await cast(Any, answer).aclose()


@pytest.mark.parametrize("working", [False, True])
async def test_one_that_sleeps_is_ready_and_not_woken(working: bool) -> None:
    model = AskedModel()
    model.where = Presence.ASLEEP
    if working:  # a request that waits for its start
        model.jobs.append(cast(ModelJob, None))
    assert await Readiness(model, may_sleep=True).check() == {"status": "ready"}
    assert model.asked == 0


async def test_one_that_cannot_be_started_is_not_ready() -> None:
    model = AskedModel()
    model.where = Presence.ABSENT
    with pytest.raises(ApiError, match="does not run yet"):
        await Readiness(model, may_sleep=True).check()
    assert model.asked == 0


async def test_what_a_sleeper_is_capable_of_is_said_from_memory() -> None:
    model = AskedModel()
    readiness = Readiness(model, may_sleep=True)
    model.where = Presence.ASLEEP
    with pytest.raises(ApiError, match="no replica now"):
        await readiness.status()
    model.where = Presence.AWAKE
    await asyncio.sleep(FRESH_S)
    known = await readiness.status()
    model.where = Presence.ASLEEP
    await asyncio.sleep(FRESH_S)
    assert await readiness.status() == known
    assert model.asked == 1
