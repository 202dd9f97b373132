"""Who asks how the model is, and how often, is no work for it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import httpx
import pytest

from service.artifacts import MAIN
from service.errors import ApiError
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.model.readiness import RecentStatus
from service.model.replica import ModelStatus
from service.settings import Settings
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
    look = RecentStatus(model.status)
    model.health = ApiError("engine_unavailable", "stalled")
    with suppress(ApiError):
        await look.status()
    model.may_answer.clear()
    first = asyncio.create_task(look.status())
    while model.asked < 2:
        await asyncio.sleep(0)
    model.health = ScriptedModel().health
    with pytest.raises(ApiError, match="stalled"):
        await look.status()
    monkeypatch.setattr("service.model.readiness.PATIENCE_S", 0.0)
    late = asyncio.create_task(look.status())
    await asyncio.sleep(0)
    assert not late.done()
    model.may_answer.set()
    assert (await first).health == (await late).health == model.health
    assert model.asked == 2


async def test_what_was_found_is_not_kept_long(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AskedModel()
    look = RecentStatus(model.status)
    await look.status()
    await look.status()
    assert model.asked == 1
    monkeypatch.setattr("service.model.readiness.FRESH_S", 0.0)
    await look.status()
    assert model.asked == 2
