"""LLaVA-NeXT and Qwen2.5-VL (multimodal positions, GQA) on vLLM, against the Hugging Face engine."""

from __future__ import annotations

import asyncio

import pytest_asyncio

from steering.engines.huggingface.engine import HuggingFaceEngine
from tests.steering.engines.driving import send
from tests.steering.engines.test_engine_families import SIZES, family_request
from tests.steering.engines.vllm.agreement import assert_agree
from tests.steering.engines.vllm.conftest import TinyModel, running_engine

SETTINGS = [
    {"strength": 0.8, "form": "difference"},
    {"strength": 1.0, "form": "published", "gamma": 0.6, "plausibility": 0.2},
    {"enabled": False},
    {"strength": 1.0, "form": "union"},
    {"strength": 0.5, "gamma": 0.5},
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engines(tiny_family, tiny_family_artifact):
    """vLLM and what it is compared with."""
    reference = HuggingFaceEngine(tiny_family, tiny_family_artifact)
    await reference.start()
    async with running_engine(TinyModel(tiny_family, tiny_family_artifact)) as engine:
        yield engine, reference
    await reference.stop()


async def test_a_family_answers_alone_and_together_as_on_hugging_face(engines):
    engine, reference = engines
    requests = [
        family_request(engine, sizes, f"number {index}, and what is this?", settings)
        for index, (sizes, settings) in enumerate(zip(SIZES, SETTINGS, strict=True))
    ]
    expected = [await send(reference, request) for request in requests]
    alone = [await send(engine, request) for request in requests]
    assert_agree(alone, expected)
    await engine.vllm.reset_prefix_cache()
    together = await asyncio.gather(*(send(engine, request) for request in requests))
    assert_agree(together, expected)
    for answers in (alone, together):
        assert [one.end.prompt_tokens for one in answers] == [one.end.prompt_tokens for one in expected]
        assert [one.end.receipt.positions for one in answers] == [one.end.receipt.positions for one in expected]
        assert [one.end.receipt.applied for one in answers] == [True, True, False, True, True]
