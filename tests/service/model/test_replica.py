"""The model's side in process: a real engine on a tiny checkpoint, from a job to events."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from service.chat.streaming import AnswerHead, completion_json
from service.draining import drain
from service.errors import ApiError
from service.example import example_answer, example_picture
from service.images.decoder import RgbImage
from service.images.worker import decode
from service.model.job import ModelJob, Turn
from service.model.replica import AnswerStart, ModelReplica, build_engine, max_tokens_for, system_fingerprint
from service.settings import BUNDLED_ARTIFACT, EngineSettings, Settings, SettingsError
from steering.engines.base import GenerationEnd, ResponseFormat, Sampling, TextDelta
from steering.request import RequestedSteering, SteeringRequest
from tests.service.chat.test_streaming import played
from tests.tiny_models import drawn_image

PICTURE = drawn_image(3)
IMAGE = RgbImage(PICTURE.width, PICTURE.height, PICTURE.tobytes())
CONTEXT = 256
CPU = EngineSettings(device="cpu")


@pytest.fixture(scope="module")
def settings(tiny_llava: Path, tiny_artifact: Path) -> Settings:
    return Settings(model=str(tiny_llava), artifact=str(tiny_artifact), engine=CPU, default_max_tokens=6)


@pytest.fixture
async def replica(settings: Settings) -> AsyncIterator[ModelReplica]:
    replica = ModelReplica(settings)
    await replica.start()
    yield replica
    await replica.stop()


def job(
    *, images: int | tuple[RgbImage, ...] = 1, max_tokens: int | None = 4, text: str = "what?", **changes
) -> ModelJob:
    pixels = images if isinstance(images, tuple) else (IMAGE,) * images
    fields = {
        "request_id": "r",
        "turns": (Turn("user", (*[None] * len(pixels), text)),),
        "images": pixels,
        "max_tokens": max_tokens,
        "sampling": Sampling(max_tokens=1, temperature=0.0),
        "steering": RequestedSteering(settings=SteeringRequest()),
        "tenant": "",
    }
    return ModelJob(**{**fields, **changes})


async def events_of(replica: ModelReplica, asked: ModelJob) -> list:
    return [event async for event in replica.generate(asked)]


async def test_an_answer(replica: ModelReplica) -> None:
    start, *deltas, end = await events_of(replica, job())
    assert isinstance(start, AnswerStart)
    assert start.system_fingerprint.startswith("fp_")
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert isinstance(end, GenerationEnd)
    assert start.prompt_tokens == end.prompt_tokens == len("USER: \nwhat? ASSISTANT:") + 4
    assert end.completion_tokens == [4]
    assert end.receipt.applied


async def test_who_drains_the_machine_waits_for_it(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "drain"
    replica = ModelReplica(settings.model_copy(update={"drain_file": str(file)}))
    await replica.start()
    try:
        async with aclosing(replica.generate(job())) as events:
            await anext(events)
            assert not drain(file, 0.0)
        assert drain(file, 0.0)
    finally:
        await replica.stop()


async def test_tenants_stay_apart(replica: ModelReplica) -> None:
    """What an engine does with it is tested with the engines."""
    request, _prompt_tokens = replica.prepare(job(tenant="alice"))
    assert request.tenant == "alice"


async def test_without_max_tokens_the_default_counts(replica: ModelReplica) -> None:
    end = (await events_of(replica, job(max_tokens=None)))[-1]
    assert end.completion_tokens[0] <= 6


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"text": "x" * CONTEXT}, "context_length_exceeded", "messages"),
        ({"max_tokens": CONTEXT}, "context_length_exceeded", "max_tokens"),
        (
            {"max_tokens": CONTEXT, "max_tokens_field": "max_completion_tokens"},
            "context_length_exceeded",
            "max_completion_tokens",
        ),
        ({"sampling": Sampling(max_tokens=1, logit_bias={10**6: 1.0})}, "invalid_value", "logit_bias.1000000"),
        (
            {"sampling": Sampling(max_tokens=1, response_format=ResponseFormat(json_schema='{"$ref":"#"}'))},
            "invalid_value",
            "response_format.json_schema.schema",
        ),
        (
            {"images": 0, "steering": RequestedSteering(settings=SteeringRequest(enabled=True), explicit=True)},
            "invalid_steering",
            "steering",
        ),
        (
            {"steering": RequestedSteering(settings=SteeringRequest(preset="none"))},
            "invalid_steering",
            "steering.preset",
        ),
    ],
)
async def test_a_refusal_is_an_event(replica: ModelReplica, changes: dict, code: str, param: str) -> None:
    refusal = (await events_of(replica, job(**changes)))[-1]
    assert isinstance(refusal, ApiError)
    assert (refusal.status, refusal.code, refusal.param) == (400, code, param)


async def test_a_failure_nobody_foresaw_is_an_event_too(replica: ModelReplica) -> None:
    broken = dataclasses.replace(job(), images=(RgbImage(PICTURE.width, PICTURE.height, b"too few bytes"),))
    (failure,) = await events_of(replica, broken)
    assert isinstance(failure, ApiError)
    assert failure.code == "internal_error"
    assert "bytes" not in failure.message


async def test_the_bundled_miniature_is_served_by_default_and_answers_the_example_as_shown() -> None:
    picture = decode(example_picture(), 10_000, 100)
    image = RgbImage(picture.width, picture.height, picture.tobytes())
    replica = ModelReplica(Settings(engine=CPU))
    await replica.start()
    _, *events = await events_of(replica, job(images=(image,), text="Describe the image.", max_tokens=48))
    await replica.stop()
    config = json.loads((BUNDLED_ARTIFACT / "config.json").read_text())
    assert events[-1].receipt.artifact == config["fingerprint"]
    assert events[-1].receipt.preset == config["default_preset"]
    expected = example_answer("llava")
    head = AnswerHead(**{name: expected[name] for name in ("id", "created", "model", "system_fingerprint")})
    answer = json.loads(await completion_json(head, played(*events), n=1, logprobs=False))
    shifts = [one["steering"].pop("relative_shift") for one in (answer, expected)]
    assert shifts[0] == pytest.approx(shifts[1], abs=0.01)
    [got], [shown] = (one["steering"].pop("mismatch") for one in (answer, expected))
    assert got == pytest.approx(shown, abs=0.01)
    assert answer == expected


def test_vllm_is_built_as_set_and_sends_no_usage_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "0")
    asked = {
        "branches": 1, "cpu_threads": 3, "kv_cache_gib": 0.5, "gpu_memory_share": 0.4, "tensor_parallel_size": 2,
        "compile": True, "max_batch_size": 5,
    }  # fmt: skip
    engine = build_engine(Settings(engine=EngineSettings(name="vllm", device="cpu", **asked)))
    assert type(engine).__name__ == "VllmEngine"
    built = dataclasses.asdict(vars(engine)["_options"])
    assert {**built, **asked, "device": "cpu", "dtype": "float32"} == built
    assert [os.environ[name] for name in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "OMP_NUM_THREADS")] == ["1", "1", "3"]


async def test_long_texts_keep_only_their_own_threads_busy(
    replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, at_once = threading.Event(), []

    def slow(_job: ModelJob) -> None:
        at_once.append(1)
        go_on.wait(60)
        raise ApiError("context_length_exceeded", "too long")

    monkeypatch.setattr(replica, "prepare", slow)
    asked = [asyncio.create_task(events_of(replica, job(request_id=f"r{index}"))) for index in range(40)]
    try:
        async with asyncio.timeout(10):
            await asyncio.gather(*(asyncio.to_thread(int) for _ in range(40)))
            while not at_once:
                await asyncio.sleep(0.01)
        asked[-1].cancel()
        await asyncio.wait(asked[-1:])
        assert len(at_once) <= 2
    finally:
        go_on.set()
    assert len(await asyncio.gather(*asked[:-1])) == len(at_once) == 39, "the client of the last one left"


async def test_closing_an_answer_frees_the_engine(replica: ModelReplica) -> None:
    answer = replica.generate(job(max_tokens=200, sampling=Sampling(max_tokens=1, logit_bias={257: -100.0})))
    await anext(answer)
    await anext(answer)
    assert replica.status().health.running == 1
    await answer.aclose()
    for _ in range(100):
        if replica.status().health.running == 0:
            break
        await asyncio.sleep(0.01)
    assert replica.status().health.running == 0


async def test_health_follows_the_engine(replica: ModelReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    replica.check_health()
    stuck = dataclasses.replace(replica.status().health, seconds_since_progress=61.0)
    monkeypatch.setattr(replica._engine, "health", lambda: stuck)
    with pytest.raises(RuntimeError, match="no step for 61 s"):
        replica.check_health()
    monkeypatch.undo()
    await replica.stop()
    with pytest.raises(RuntimeError, match="ended"):
        replica.check_health()


async def test_an_unknown_default_preset_stops_the_start(settings: Settings) -> None:
    replica = ModelReplica(settings.model_copy(update={"default_preset": "nonsense"}))
    with pytest.raises(SettingsError, match=r"no 'nonsense'; it has .*'captions'"):
        await replica.start()
    await replica.stop()


async def test_the_fingerprint_tells_models_apart(replica: ModelReplica, settings: Settings) -> None:
    able = replica.status().capabilities
    first = system_fingerprint(settings, able)
    assert first == system_fingerprint(settings, able) == replica.status().system_fingerprint
    assert first != system_fingerprint(settings, dataclasses.replace(able, artifact=None))
    assert first != system_fingerprint(
        settings.model_copy(update={"engine": EngineSettings(device="cpu", dtype="bfloat16")}), able
    )


def test_how_many_tokens_fit() -> None:
    assert max_tokens_for(None, 10, 100, 50) == 50
    assert max_tokens_for(None, 90, 100, 50) == 10
    assert max_tokens_for(90, 10, 100, 50) == 90
    with pytest.raises(ApiError, match=r"10 tokens.*max_tokens is 91.*100 tokens.*at most 90") as caught:
        max_tokens_for(91, 10, 100, 50)
    assert caught.value.param == "max_tokens"
    with pytest.raises(ApiError, match=r"100 tokens.*context is 100") as caught:
        max_tokens_for(None, 100, 100, 50)
    assert caught.value.param == "messages"


def test_the_ingress_loads_no_torch() -> None:
    heavy = ["torch", "transformers", "tokenizers", "safetensors"]
    program = f"import sys, service.app; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
