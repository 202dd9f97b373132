"""Real vLLM engines on the CPU, and the Hugging Face engine to compare them with.

All tests here share one event loop, since a vLLM engine belongs to the loop that started it. Nothing here imports an
engine before a test asks for one.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from inspect import iscoroutinefunction
from pathlib import Path

import pytest
import pytest_asyncio

from tests.steering.engines.vllm import processes

BLOCK_TOKENS = 32
"""The smallest block of vLLM's CPU attention: the tests' prompts fill several, so caching has something to do."""


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if iscoroutinefunction(item.function):
                item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@dataclass(frozen=True)
class TinyModel:
    """A random checkpoint that vLLM's CPU attention takes (heads of 32), with an artifact."""

    model: Path
    artifact: Path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, TinyModel]:
    from tests.tiny_models import save_tiny_artifact, save_tiny_llava

    made = {}
    for name, num_kv_heads in (("mha", 4), ("gqa", 2)):
        folder = tmp_path_factory.mktemp(name)
        model = save_tiny_llava(folder / "model", num_kv_heads=num_kv_heads, hidden_size=128)
        made[name] = TinyModel(model, save_tiny_artifact(folder / "artifact", model))
    return made


@asynccontextmanager
async def running_engine(
    tiny: TinyModel, *, steered: bool = True, second_runner: bool = False, spawned: bool = False, **options
):
    """A started vLLM engine, stopped at the end. `spawned`: its processes are started as a user's are."""
    from steering.engines.vllm.engine import VllmEngine

    arguments = {"block_size": BLOCK_TOKENS} | options.pop("vllm_arguments", {})
    engine = VllmEngine(
        tiny.model, tiny.artifact if steered else None, kv_cache_gib=0.05, vllm_arguments=arguments, **options
    )
    runner = processes.second_runner() if second_runner else nullcontext()
    with runner, nullcontext() if spawned else processes.forked_processes():
        await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def references(tiny_models):
    """Hugging Face engines, by model: their mode 'causal' is what vLLM must do."""
    from steering.engines.huggingface.engine import HuggingFaceEngine

    engines = {name: HuggingFaceEngine(tiny.model, tiny.artifact) for name, tiny in tiny_models.items()}
    for engine in engines.values():
        await engine.start()
    yield engines
    for engine in engines.values():
        await engine.stop()


@pytest.fixture(scope="session")
def reference(references):
    """What the default engine is compared with."""
    return references["mha"]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine(tiny_models):
    """The default one: MHA, two branches, prefix caching."""
    async with running_engine(tiny_models["mha"]) as engine:
        yield engine


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def second_runner_engine(tiny_models):
    """As the default one, on vLLM's second model runner with its Triton kernels and ours interpreted."""
    async with running_engine(tiny_models["mha"], second_runner=True) as engine:
        yield engine


@pytest.fixture(params=["first runner", "second runner"])
def either_engine(request, engine, second_runner_engine):
    """The default one, and the same on the second runner."""
    return engine if request.param == "first runner" else second_runner_engine
