"""LLaVA-NeXT and Qwen2.5-VL (multimodal positions, GQA) on both of vLLM's runners, against the Hugging Face engine."""

from __future__ import annotations

import asyncio

import pytest_asyncio

from steering.engines.huggingface.engine import HuggingFaceEngine
from tests.steering.engines.driving import send
from tests.steering.engines.test_engine_families import SIZES, family_request
from tests.steering.engines.vllm.agreement import assert_agree
from tests.steering.engines.vllm.conftest import TinyModel, running_engine
from tests.steering.engines.vllm.conversations import SHORT, image_end, in_turn

SETTINGS = [
    {"strength": 0.8, "form": "difference"},
    {"strength": 1.0, "form": "published", "gamma": 0.6, "plausibility": 0.2},
    {"enabled": False},
    {"strength": 1.0, "form": "union", "min_answer_tokens": 2},
    {"strength": 0.5, "gamma": 0.5},
]
RUNNERS = {"first runner": "cpu_model_runner", "second runner": "cpu.model_runner"}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def family_reference(tiny_family, tiny_family_artifact):
    """What vLLM is compared with."""
    reference = HuggingFaceEngine(tiny_family, tiny_family_artifact)
    await reference.start()
    yield reference
    await reference.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=list(RUNNERS))
async def engines(request, tiny_family, tiny_family_artifact, family_reference):
    """vLLM, what it is compared with, and whether it is on the second runner."""
    tiny = TinyModel(tiny_family, tiny_family_artifact)
    second = request.param == "second runner"
    async with running_engine(tiny, second_runner=second) as engine:
        runners = await engine.vllm.collective_rpc("model_runner_name")
        assert set(runners) == {f"vllm.v1.worker.{RUNNERS[request.param]}"}
        yield engine, family_reference, second


async def test_a_family_answers_alone_and_together_as_on_hugging_face(engines):
    """Alone on the first runner; on the second, whose kernels are interpreted, together says as much."""
    engine, reference, second = engines
    requests = [
        family_request(engine, sizes, f"number {index}, and what is this?", settings)
        for index, (sizes, settings) in enumerate(zip(SIZES, SETTINGS, strict=True))
    ]
    expected = await in_turn(reference, requests)
    found = [] if second else [await in_turn(engine, requests)]
    await engine.vllm.reset_prefix_cache()
    found.append(await asyncio.gather(*(send(engine, request) for request in requests)))
    for answers in found:
        assert_agree(answers, expected)
        assert [one.end.prompt_tokens for one in answers] == [one.end.prompt_tokens for one in expected]
        assert [one.end.receipt.positions for one in answers] == [one.end.receipt.positions for one in expected]
        assert [one.end.receipt.applied for one in answers] == [True, True, False, True, True]


async def test_an_image_whose_tokens_are_all_in_the_prefix_cache(engines):
    """As for LLaVA in test_parity.py; how many tokens an image has, and at which positions, its shape decides."""
    engine, reference, _ = engines
    requests = [
        family_request(engine, (size,), SHORT, {"strength": 1.0, "gamma": gamma}, max_tokens=3)
        for gamma in (1.0, 0.5)
        for size in ((100, 31), (64, 64), (100, 31))
    ]
    answers, cached = [], []
    for request in requests:
        before = engine.progress.cached_tokens
        answers.append(await send(engine, request))
        cached.append(engine.progress.cached_tokens - before)
    expected = await in_turn(reference, requests)
    assert_agree(answers, expected)
    assert [one.end.receipt.positions for one in answers] == [one.end.receipt.positions for one in expected]
    assert all(cached[again] >= image_end(engine, requests[again], answers[again]) for again in (2, 5))
