"""Artifacts beside the service's own, through HTTP, in process with a scripted model: who answers, who may say so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.artifacts import MAIN, Able
from service.callers.ledger import Ledger
from service.errors import ApiError
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.live_settings import LiveSettings
from service.model.readiness import FRESH_S
from service.settings import BUNDLED_ARTIFACT, BUNDLED_MODEL, Settings
from steering.artifact_config import read_config
from tests.service.examples import ScriptedModel, body, delta, end, image_part, user

BUNDLED = Settings(model=str(BUNDLED_MODEL), artifact=str(BUNDLED_ARTIFACT), allow_anonymous=True)
OWN = read_config(Path(BUNDLED_ARTIFACT))
NEXT = Able(OWN.model_copy(update={"fingerprint": "b" * 64}), "scripted", ("causal",), 1, "fp_next")
CHAT = "/v1/chat/completions"
ARMS = [{"name": "old", "weight": 0.5, "artifact": MAIN}, {"name": "new", "weight": 0.5, "artifact": "next"}]
CANARY = {"name": "canary", "arms": ARMS}
SHADOWED = {"name": "shadowed", "arms": [{"name": "all", "weight": 1}], "shadow": {"artifact": "next", "share": 1}}


class TwoArtifacts(ScriptedModel):
    """Answers with the fingerprint of the artifact that was asked for, and knows how each is."""

    def __init__(self) -> None:
        super().__init__()
        self.down: set[str] = set()

    async def generate(self, job):
        if job.artifact in self.down:
            raise ApiError("engine_unavailable", "lost")
        self.events = (delta(0, job.artifact, finish="stop"), end(1, artifact=job.artifact))
        async for event in super().generate(job):
            yield event

    async def status(self, artifact: str = MAIN):
        if artifact in self.down:
            raise ApiError("engine_unavailable", "lost")
        return await super().status(artifact)


class Service:
    def __init__(self) -> None:
        self.model, self.live = TwoArtifacts(), LiveSettings(BUNDLED)
        self.decoder = ImageDecoder(workers=1, limits=DecoderLimits())
        api = build_api(BUNDLED, self.model, self.decoder, live=self.live, ledger=Ledger())
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test")

    def change(self, **changes: Any) -> str | None:
        self.live.change(changes)
        return self.live.describe()["refused"]

    async def ask(self, unit: str = "visitor", **fields: Any) -> httpx.Response:
        asked = {"model": BUNDLED.model_name, "user": unit, **fields}
        return await self.client.post(CHAT, json=body(user(image_part(), "what?"), **asked))

    async def answered_by(self, unit: str = "visitor", **fields: Any) -> str:
        return (await self.ask(unit, **fields)).json()["steering"]["artifact"]

    async def version(self) -> dict[str, Any]:
        return (await self.client.get("/version")).json()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made = Service()
    yield made
    made.decoder.close()
    await made.client.aclose()


async def test_promoted_and_rolled_back(service: Service) -> None:
    service.live.know({"next": NEXT})
    assert await service.answered_by() == MAIN, "it is loaded, and nobody sent anything to it"
    assert service.change(default_artifact="next") is None
    assert await service.answered_by() == "next"
    assert await service.answered_by(steering={"strength": 0.5}) == "next", "a caller's own steering, too"
    service.change()
    assert await service.answered_by() == MAIN


async def test_an_arm_answers_with_its_own_and_the_others_with_theirs(service: Service) -> None:
    service.live.know({"next": NEXT})
    assert service.change(experiment=CANARY) is None
    seen = {}
    for number in range(40):
        response = await service.ask(f"visitor-{number}")
        seen[response.headers["x-vlsae-arm"]] = response.json()["steering"]["artifact"]
    assert seen == {"old": MAIN, "new": "next"}
    assert await service.answered_by(steering={"strength": 0.5}) == MAIN, "in no arm"
    lines = (await service.client.get("/metrics")).text
    assert 'vlsae_requests_total{applied="true",arm="new",artifact="next",finish="stop"}' in lines
    assert 'vlsae_requests_total{applied="true",arm="old",artifact="main",finish="stop"}' in lines


async def test_an_arm_that_names_none_has_the_default_one(service: Service) -> None:
    service.live.know({"next": NEXT})
    arms = [{"name": "held_back", "weight": 0.5, "artifact": MAIN}, {"name": "rest", "weight": 0.5}]
    assert service.change(default_artifact="next", experiment={"name": "e", "arms": arms}) is None
    seen = {
        (await service.ask(f"visitor-{n}")).headers["x-vlsae-arm"]: service.model.jobs[-1].artifact for n in range(40)
    }
    assert seen == {"held_back": MAIN, "rest": "next"}


async def test_a_shadow_runs_on_another_and_is_not_shown(service: Service) -> None:
    service.live.know({"next": NEXT})
    assert service.change(experiment=SHADOWED) is None
    assert await service.answered_by() == MAIN
    async with asyncio.timeout(20):
        while len(service.model.jobs) < 2:
            await asyncio.sleep(0.01)
    assert [job.artifact for job in service.model.jobs] == [MAIN, "next"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"steering": {"artifact": "next"}}, 400),
        ({"artifact": "next"}, 400),
        ({"model": BUNDLED.model_name + ":next"}, 404),
    ],
)
async def test_no_caller_chooses(service: Service, fields: dict, status: int) -> None:
    service.live.know({"next": NEXT})
    assert (await service.ask(**fields)).status_code == status
    assert service.model.jobs == []


@pytest.mark.parametrize("change", [{"default_artifact": "next"}, {"experiment": CANARY}, {"experiment": SHADOWED}])
async def test_a_change_waits_for_a_candidate_that_loads(service: Service, change: dict) -> None:
    assert "candidate 'next': no application" in (service.change(**change) or "")
    service.live.know({"next": "not loaded (DEPLOYING): `serve status` says more"})
    assert "not loaded (DEPLOYING)" in (service.live.describe()["refused"] or "")
    assert (service.live.current, await service.answered_by()) == (BUNDLED, MAIN), "what was in force stays"
    service.live.know({"next": NEXT})
    assert service.live.describe()["refused"] is None
    assert service.live.describe()["changed"] == change


async def test_what_a_later_change_took_back_does_not_come(service: Service) -> None:
    service.change(default_artifact="next")
    service.change(max_choices=2)
    service.live.know({"next": NEXT})
    assert (service.live.current.default_artifact, service.live.current.max_choices) == (MAIN, 2)


@pytest.mark.parametrize("change", [{"default_artifact": "next"}, {"experiment": CANARY}])
async def test_one_that_goes_leaves_the_service_s_own_and_says_so(service: Service, change: dict) -> None:
    service.live.know({"next": NEXT})
    service.change(**change, max_choices=2)
    service.live.know({})
    assert service.live.current == BUNDLED.model_copy(update={"max_choices": 2})
    told = (await service.version())["live_settings"]
    assert "candidate 'next': no application" in told["refused"]
    assert told["changed"] == {"max_choices": 2}
    assert await service.answered_by() == MAIN
    service.live.know({"next": NEXT})
    assert service.live.describe()["refused"] is None, "it is back, and so is what was wanted"


async def test_presets_are_those_of_the_artifact_that_answers(service: Service) -> None:
    few = NEXT.config.model_copy(update={"presets": {"off": OWN.presets["off"]}, "default_preset": "off"})
    service.live.know({"next": NEXT._replace(config=few)})
    arms = [ARMS[0], {**ARMS[1], "steering": {"preset": "captions"}}]
    assert "arms: new: " in (service.change(experiment={**CANARY, "arms": arms}) or "")
    assert "'captions'" in (service.change(default_artifact="next", default_preset="captions") or "")
    two = [ARMS[0], {**ARMS[1], "steering": {"gamma": 0.5, "preset": "captions"}}]
    service.live.know({"next": NEXT})
    assert "two branches" in (service.change(experiment={**CANARY, "arms": two}) or "")


async def test_the_version_tells_of_all(service: Service) -> None:
    service.live.know({"next": NEXT, "bad": "not loaded (DEPLOY_FAILED): made for another model"})
    told = await service.version()
    assert told["default_artifact"] == MAIN
    assert told["candidates"]["bad"] == {"refused": "not loaded (DEPLOY_FAILED): made for another model"}
    assert told["candidates"]["next"]["artifact"] == "b" * 64
    assert "made for another model" in (service.change(default_artifact="bad") or "")


async def test_ready_is_who_answers_by_default(service: Service) -> None:
    service.live.know({"next": NEXT})
    service.model.down = {"next"}
    service.change(experiment=CANARY)
    assert (await service.client.get("/readyz")).status_code == 200, "an arm's is not all of it"
    service.change(default_artifact="next")
    service.model.down = {MAIN}
    await _fresh()
    assert (await service.client.get("/readyz")).status_code == 200
    service.model.down = {"next"}
    await _fresh()
    assert (await service.client.get("/readyz")).status_code == 503


async def _fresh() -> None:
    """The last look is too old to be used again."""
    await asyncio.sleep(FRESH_S + 0.05)
