"""Engines on the tiny checkpoint."""

from __future__ import annotations

import pytest_asyncio

from steering.engines.huggingface.engine import HuggingFaceEngine


@pytest_asyncio.fixture
async def engine(tiny_llava, tiny_artifact):
    engine = HuggingFaceEngine(tiny_llava, tiny_artifact)
    await engine.start()
    yield engine
    await engine.stop()
