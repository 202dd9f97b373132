"""An experiment through HTTP, in process with a scripted model: who gets what, who is told what, what is counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from service.callers.ledger import Ledger
from service.errors import ApiError
from service.http.api import build_api
from service.images.decoder import DecoderLimits, ImageDecoder
from service.live_settings import LiveSettings
from service.settings import BUNDLED_ARTIFACT, BUNDLED_MODEL, Settings
from tests.service.examples import ScriptedModel, body, delta, image_part, user

BUNDLED = Settings(
    model=str(BUNDLED_MODEL), artifact=str(BUNDLED_ARTIFACT), allow_anonymous=True, default_preset="questions",
    default_strength=0.75,
)  # fmt: skip
CHAT, FEEDBACK = "/v1/chat/completions", "/v1/feedback"
TWO_ARMS = [{"name": "control", "weight": 0.5}, {"name": "bold", "weight": 0.5, "steering": {"preset": "captions"}}]
EXPERIMENT = {"name": "presets", "arms": TWO_ARMS}


class Failing(ScriptedModel):
    """Loses every request of one arm, before or after its first token."""

    early = True

    async def generate(self, job):
        if job.steering.arm != "bold":
            async for event in super().generate(job):
                yield event
            return
        if not self.early:
            async for event in ScriptedModel(delta(0, "a"), ApiError("engine_unavailable", "lost")).generate(job):
                yield event
        raise ApiError("engine_unavailable", "lost")


class Service:
    def __init__(self, model: ScriptedModel) -> None:
        self.model, self.live, self.decoder = (
            model,
            LiveSettings(BUNDLED),
            ImageDecoder(workers=1, limits=DecoderLimits()),
        )
        api = build_api(BUNDLED, model, self.decoder, live=self.live, ledger=Ledger())
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test")

    async def ask(self, unit: str | None = None, *, header: str | None = None, **fields: Any) -> httpx.Response:
        asked = {"model": BUNDLED.model_name, **({} if unit is None else {"user": unit}), **fields}
        headers = {} if header is None else {"x-experiment-unit": header}
        return await self.client.post(CHAT, json=body(user(image_part(), "what?"), **asked), headers=headers)

    async def metrics(self) -> list[str]:
        return (await self.client.get("/metrics")).text.splitlines()


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Service]]:
    started: list[Service] = []

    def build(model: ScriptedModel | None = None, experiment: dict | None = EXPERIMENT) -> Service:
        started.append(Service(model or ScriptedModel()))
        if experiment is not None:
            started[-1].live.change({"experiment": experiment})
            assert started[-1].live.describe()["refused"] is None
        return started[-1]

    yield build
    for service in started:
        service.decoder.close()
        await service.client.aclose()


def told(response: httpx.Response) -> tuple[str | None, str | None]:
    return response.headers.get("x-vlsae-arm"), response.headers.get("x-vlsae-assignment")


async def unit_in(service: Service, arm: str) -> str:
    """Some unit that falls into it."""
    for number in range(100):
        if told(await service.ask(f"seek-{number}"))[0] == arm:
            return f"seek-{number}"
    raise AssertionError(f"nobody of a hundred is in {arm}")


async def test_a_unit_stays_in_its_arm_and_the_arm_steers(start: Callable[..., Service]) -> None:
    service = start()
    arms = {}
    for round_ in range(2):
        for number in range(40):
            response = await service.ask(f"visitor-{number}", stream=bool(round_))
            arm, why = told(response)
            assert (response.status_code, why) == (200, "unit")
            assert arms.setdefault(number, arm) == arm
            asked = service.model.jobs[-1].steering
            assert asked.arm == arm
            assert not asked.explicit
            expected = ("captions", None) if arm == "bold" else ("questions", 0.75)
            assert (asked.settings.preset, asked.settings.strength) == expected
    counts = Counter(arms.values())
    assert set(counts) == {"control", "bold"}
    assert min(counts.values()) >= 8, "of 40; less is one in 20,000"


async def test_the_header_and_the_body_name_the_same_unit(start: Callable[..., Service]) -> None:
    service = start()
    for number in range(12):
        unit = f"visitor-{number}"
        assert told(await service.ask(unit)) == told(await service.ask(header=unit))
        assert told(await service.ask("somebody else", header=unit)) == told(await service.ask(unit)), "header wins"


async def test_without_a_unit_it_is_the_default_arm_and_says_so(start: Callable[..., Service]) -> None:
    service = start()
    for unit in (None, ""):
        response = await service.ask(unit)
        assert told(response) == ("control", "no_unit")
        assert service.model.jobs[-1].steering.arm == "control"
    assert 'vlsae_assignments_total{arm="no_unit"} 2.0' in await service.metrics()


@pytest.mark.parametrize(
    "own",
    [
        {"steering": {"strength": 0.1}},
        {"steering": {"enabled": False}},
        {"model": BUNDLED.model_name + ":off"},
        {"model": BUNDLED.model_name + ":steered"},
    ],
)
async def test_a_caller_s_own_steering_wins_and_is_counted_apart(start: Callable[..., Service], own: dict) -> None:
    service, without = start(), start(experiment=None)
    unit = await unit_in(service, "bold")
    response = await service.ask(unit, **own)
    assert told(response) == ("own", "own")
    await without.ask(unit, **own)
    asked, plain = service.model.jobs[-1].steering, without.model.jobs[-1].steering
    assert asked.settings == plain.settings, "as if there were no experiment"
    assert (asked.explicit, asked.arm, plain.arm) == (plain.explicit, "own", None)
    assert 'vlsae_assignments_total{arm="own"} 1.0' in await service.metrics()


async def test_the_strength_header_is_a_caller_s_own_too(start: Callable[..., Service]) -> None:
    service = start()
    ask = body(user(image_part(), "what?"), model=BUNDLED.model_name, user="visitor")
    response = await service.client.post(CHAT, json=ask, headers={"x-steering-strength": "0.5"})
    assert told(response) == ("own", "own")
    assert (await service.ask("visitor", steering={})).headers["x-vlsae-assignment"] == "unit", "asks for nothing"


async def test_nobody_hears_of_arms_where_there_are_none(start: Callable[..., Service]) -> None:
    service = start(experiment=None)
    response = await service.ask("visitor")
    assert told(response) == (None, None)
    assert service.model.jobs[-1].steering.arm is None
    assert not any(line.startswith("vlsae_assignments_total{") for line in await service.metrics())


async def test_growing_coverage_lets_in_and_moves_nobody(start: Callable[..., Service]) -> None:
    service = start(experiment={**EXPERIMENT, "coverage": 0.3})
    units = [f"visitor-{number}" for number in range(40)]
    before = {unit: told(await service.ask(unit))[0] for unit in units}
    assert "not_covered" in before.values()
    service.live.change({"experiment": {**EXPERIMENT, "coverage": 1}})
    after = {unit: told(await service.ask(unit))[0] for unit in units}
    assert [unit for unit in units if before[unit] not in ("not_covered", after[unit])] == []
    assert "not_covered" not in after.values()


@pytest.mark.parametrize(
    "units", [["a" * 257], ["a" * 2**20], ["a\x01b"], ["a\x7f"], ["caf\xe9"], ["a", "b"], [""]],
    ids=["long", "megabyte", "control", "delete", "latin", "two", "empty"],
)  # fmt: skip
async def test_a_unit_that_is_no_identifier_is_refused_by_name(start: Callable[..., Service], units: list) -> None:
    service = start()
    ask = body(user("what?"), model=BUNDLED.model_name)
    headers = [(b"x-experiment-unit", one.encode("latin-1")) for one in units]
    response = await service.client.post(CHAT, json=ask, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_header", "x-experiment-unit")
    assert service.model.jobs == []


@pytest.mark.parametrize("early", [True, False])
async def test_an_arm_that_fails_shows_in_answers_log_and_metrics(
    start: Callable[..., Service], early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = Failing()
    service = start(model)
    unit = await unit_in(service, "bold")
    model.early = early
    caplog.clear()
    with caplog.at_level(logging.INFO, "service.requests"):
        response = await service.ask(unit)
        streamed = await service.ask(unit, stream=True)
    assert (response.status_code, told(response)) == (503, ("bold", "unit"))
    assert "engine_unavailable" in streamed.text
    facts = [getattr(line, "facts") for line in caplog.records if line.name == "service.requests"]  # noqa: B009
    assert [one["experiment"]["arm"] for one in facts] == ["bold", "bold"]
    assert {one["error_code"] for one in facts} == {"engine_unavailable"}
    assert all(unit not in str(one) for one in facts), "the unit's digest stands there"
    lines = await service.metrics()
    failed = next(line for line in lines if line.startswith('vlsae_rejections_total{arm="bold",reason="engine_una'))
    assert float(failed.split()[-1]) >= 2


async def test_feedback_is_counted_by_the_arm(start: Callable[..., Service]) -> None:
    service = start()
    unit = await unit_in(service, "bold")
    answer = (await service.ask(unit)).json()
    await service.client.post(FEEDBACK, json={"request_id": answer["id"], "score": 0.5})
    counted = [line for line in await service.metrics() if line.startswith("vlsae_feedback_score_ratio_sum")]
    assert len(counted) == 1
    assert 'arm="bold"' in counted[0]


async def test_a_change_counts_from_the_next_request_on_and_a_wrong_one_never(start: Callable[..., Service]) -> None:
    service = start()
    unit = await unit_in(service, "bold")
    service.live.change({"experiment": {**EXPERIMENT, "arms": [{**TWO_ARMS[0], "weight": 0.9}, TWO_ARMS[1]]}})
    told_of = (await service.client.get("/version")).json()["live_settings"]
    assert "the weights sum to 1.4" in told_of["refused"]
    assert told_of["changed"]["experiment"] == EXPERIMENT
    assert told(await service.ask(unit)) == ("bold", "unit")
    service.live.change({"experiment": {**EXPERIMENT, "name": "other", "arms": [{**TWO_ARMS[1], "weight": 1.0}]}})
    assert told(await service.ask(unit)) == ("bold", "unit"), "one arm without a shadow is none"
    service.live.change({})
    assert told(await service.ask(unit)) == (None, None)
