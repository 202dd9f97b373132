"""`POST /v1/compare` in process: one reading, one decoding, a job per setting; what one failure does to the rest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import pytest

from service.errors import ApiError
from service.http.api import build_api
from service.http.concepts.contract import ComparisonAnswer
from service.images.decoder import DecoderLimits, ImageDecoder
from service.model.client import Answer
from service.model.job import ModelJob
from service.model.replica import AnswerStart
from service.settings import Settings
from steering.engines.base import SampledToken, TextDelta, TokenLogprob
from tests.service.examples import ScriptedModel, body, end, image_part, user

COMPARE = "/v1/compare"
SETTINGS = Settings(
    model="/models/tiny", artifact="/a", allow_anonymous=True, max_body_bytes=100_000, request_timeout_s=60
)
STRENGTHS = [{"strength": 0}, {"strength": 0.5}, {"strength": 1}]


def spelled(text: str, finish=None) -> TextDelta:
    """A token with its bytes, as engines give it where logprobs are asked for."""
    token = TokenLogprob(token_id=sum(text.encode()), text=text, utf8=text.encode(), logprob=-0.5)
    return TextDelta(
        choice=0, text=text, token_ids=(token.token_id,), logprobs=(SampledToken(chosen=token),), finish_reason=finish
    )


class StrengthModel(ScriptedModel):
    """Says how strong it was steered; all its answers wait for each other."""

    def __init__(self, settings: int, failures: dict[float, Exception] | None = None) -> None:
        super().__init__()
        self._together = asyncio.Barrier(settings)
        self._failures = failures or {}

    async def generate(self, job: ModelJob) -> AsyncGenerator[Answer, None]:
        self.jobs.append(job)
        strength = job.steering.settings.strength or 0
        try:
            await self._together.wait()
            yield AnswerStart(system_fingerprint="fp_test", prompt_tokens=20)
            if strength in self._failures:
                raise self._failures[strength]
            if self._failures:
                await asyncio.Event().wait()
            for text in ("a ", f"{strength} ", "star"):
                yield spelled(text)
            yield spelled(".", "stop")
            yield end(5, strength=strength)
        finally:
            self.closed += 1


class Service:
    def __init__(self, model: ScriptedModel, settings: Settings) -> None:
        self.model, self.decoder = model, ImageDecoder(workers=1, limits=DecoderLimits())
        api = build_api(settings, model, self.decoder)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test")

    async def compare(self, *parts: str | dict, settings: object = STRENGTHS, **fields) -> httpx.Response:
        asked = body(user(*(parts or ("what?",))), settings=settings, **fields)
        return await self.client.post(COMPARE, json=asked)

    async def metric(self, start: str) -> float:
        text = (await self.client.get("/metrics")).text
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(start)), 0.0)


@pytest.fixture
async def serve() -> AsyncIterator:
    services = []

    def start(model: ScriptedModel | None = None, settings: Settings = SETTINGS) -> Service:
        services.append(Service(model or StrengthModel(len(STRENGTHS)), settings))
        return services[-1]

    yield start
    for service in services:
        service.decoder.close()
        await service.client.aclose()


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


async def test_a_comparison(serve) -> None:
    service = serve()
    response = await service.compare(image_part(), "what?")
    answer = ComparisonAnswer.model_validate_json(response.content)
    assert (answer.model, answer.system_fingerprint) == ("tiny", "fp_test")
    assert [one.steering.strength for one in answer.results] == [0, 0.5, 1]
    assert [one.message.content for one in answer.results] == ["a 0 star.", "a 0.5 star.", "a 1.0 star."]
    for number, one in enumerate(answer.results):
        assert "".join(token.text for token in one.tokens) == one.message.content
        assert [token.differs for token in one.tokens] == [False, number > 0, False, False]
        assert (one.finish_reason, one.usage.total_tokens) == ("stop", 25)
    assert [job.request_id for job in service.model.jobs] == [one.id for one in answer.results]
    assert len({job.request_id for job in service.model.jobs}) == 3


async def test_a_picture_is_decoded_and_counted_once(serve) -> None:
    service = serve()
    assert (await service.compare(image_part(), "what?")).status_code == 200
    first, *others = (job.images for job in service.model.jobs)
    assert len(first) == 1
    assert all(images[0].rows is first[0].rows for images in others), "the same pixels, not equal ones"
    assert await service.metric("vlsae_images_total") == 1
    assert await service.metric('vlsae_requests_total{applied="true",arm="none",artifact="main",finish="stop"}') == 3
    assert await service.metric("vlsae_completion_tokens_total") == 15
    for gauge in ("in_progress", "waiting", "at_model"):
        assert await service.metric(f"vlsae_requests_{gauge}") == 0


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"settings": [{}]}, (400, "invalid_value", "settings")),
        ({"settings": [{}] * 9}, (400, "invalid_value", "settings")),
        ({"settings": None}, (400, "invalid_value", "settings")),
        ({"settings": [{}, {"strength": 2}]}, (400, "invalid_value", "settings[1].strength")),
        ({"settings": [{}, {"stength": 1}]}, (400, "unknown_field", "settings[1].stength")),
        ({"settings": [{}, {}, {"control": "random"}]}, (400, "unsupported_value", "settings[2].control")),
        ({"steering": {"strength": 1}}, (400, "unsupported_value", "steering")),
        ({"stream": True}, (400, "unsupported_value", "stream")),
        ({"n": 2}, (400, "unsupported_value", "n")),
        ({"logprobs": True}, (400, "unsupported_value", "logprobs")),
        ({"max_tokens": 5000}, (400, "invalid_value", "max_tokens")),
        ({"model": "other"}, (404, "model_not_found", "model")),
    ],
)
async def test_what_is_refused_before_a_picture_is_decoded(serve, fields: dict, error: tuple) -> None:
    service = serve()
    response = await service.compare(image_part(b"no picture"), **fields)
    assert error_of(response) == error
    assert "steering." not in response.json()["error"]["message"]
    assert service.model.jobs == []


async def test_settings_that_say_nothing_are_accepted(serve) -> None:
    neutral = {"stream": False, "n": 1, "logprobs": False, "steering": None, "stream_options": None}
    assert (await serve().compare(**neutral)).status_code == 200


async def test_a_picture_that_is_none_is_named_as_in_a_chat(serve) -> None:
    assert error_of(await serve().compare(image_part(b"no"))) == (
        400, "invalid_image", "messages[0].content[0].image_url.url",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (
            ApiError("invalid_steering", "steering.preset: there is none", param="steering.preset"),
            (400, "invalid_steering", "settings[1].preset"),
        ),
        (ApiError("context_length_exceeded", "messages: too long", param="messages"),
         (400, "context_length_exceeded", "messages")),
        (ApiError("overloaded", "full"), (503, "overloaded", None)),
        (ValueError("a secret path"), (500, "internal_error", None)),
    ],
)  # fmt: skip
async def test_one_failure_ends_all(serve, failure: Exception, error: tuple) -> None:
    service = serve(StrengthModel(3, {0.5: failure}))
    response = await asyncio.wait_for(service.compare(), 20)
    assert error_of(response) == error
    assert "secret" not in response.text
    assert "steering" not in response.json()["error"]["message"]
    assert service.model.closed == 3
    assert await service.metric(f'vlsae_rejections_total{{arm="none",reason="{error[1]}"}}') == 1
    for gauge in ("in_progress", "waiting", "at_model"):
        assert await service.metric(f"vlsae_requests_{gauge}") == 0


async def test_who_leaves_cancels_all(serve) -> None:
    service = serve(StrengthModel(3, {7.0: ValueError()}))
    asking = asyncio.create_task(service.compare())
    while len(service.model.jobs) < 3:
        await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert service.model.closed == 3
    assert await service.metric("vlsae_requests_in_progress") == 0


async def test_every_setting_takes_a_place(serve) -> None:
    service = serve(StrengthModel(2), SETTINGS.model_copy(update={"max_concurrent_requests": 2}))
    refused = await service.compare()
    assert error_of(refused) == (503, "overloaded", None)
    assert "retry-after" in refused.headers
    assert service.model.jobs == []
    assert (await service.compare(settings=STRENGTHS[:2])).status_code == 200


async def test_more_settings_than_choices_are_refused(serve) -> None:
    service = serve(settings=SETTINGS.model_copy(update={"max_choices": 2}))
    assert error_of(await service.compare()) == (400, "invalid_value", "settings")


async def test_too_many_pixels_for_so_many_settings(serve) -> None:
    service = serve(settings=SETTINGS.model_copy(update={"max_memory_bytes": 2 * 3 * 48 * 32 * 3 - 1}))
    too_large = await service.compare(image_part(), max_tokens=1)
    assert error_of(too_large)[:2] in ((413, "request_too_large"), (503, "overloaded"))


async def test_the_header_and_the_alias_lie_below_a_setting(serve) -> None:
    service = serve(StrengthModel(2))
    asked = body(settings=[{}, {"strength": 1}], model="tiny:steered")
    headers = {"x-steering-strength": "0.25", "content-type": "application/json"}
    assert (await service.client.post(COMPARE, content=json.dumps(asked), headers=headers)).status_code == 200
    assert [job.steering.settings.strength for job in service.model.jobs] == [0.25, 1]
    assert all(job.steering.explicit for job in service.model.jobs)
