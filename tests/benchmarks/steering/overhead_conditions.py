"""The conditions whose speed is compared, and the engines that serve them. Times nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from steering.engines.base import Engine, GenerationRequest, Sampling
from steering.engines.huggingface.engine import HuggingFaceEngine
from steering.engines.vllm.engine import VllmEngine
from steering.request import MAX_EDITS, ConceptEdit, SteeringRequest, merge_sources
from tests.benchmarks.steering.random_llava import (
    IMAGE_MARK,
    LlavaShape,
    noise,
    save_random_artifact,
    save_random_llava,
)

OFF = SteeringRequest(enabled=False)
ONE = SteeringRequest(enabled=True, preset="captions")
TWO = ONE.model_copy(update={"gamma": 0.6, "plausibility": 0.8})
"""The paper's blend of two branches."""
EXPLAINED, EXPLAINED_TOKENS = (ONE.model_copy(update={"explain": how}) for how in ("answer", "tokens"))
OFF_EXPLAINED = OFF.model_copy(update={"explain": "answer"})
EDITED = ONE.model_copy(update={"concepts": {str(concept): ConceptEdit(add=0.1) for concept in range(MAX_EDITS)}})
EXACT = TWO.model_copy(update={"mode": "exact"})
PROMPT = f"USER: {IMAGE_MARK}\nWhat do you see? ASSISTANT:"
LOOP = "loop"
"""In the place of an engine: `two_full_passes.TwoFullPasses`."""
GIB = 1024**3
START_APART_S = 10
"""An engine's start waits for its own processes most of the time; the ports they take are taken by then."""
BLOCK_TOKENS = 128
"""vLLM's block of keys and values on a CPU, the largest that a benchmark meets."""


class Condition(NamedTuple):
    """What is asked of which engine."""

    engine: str
    """'plain': no artifact. 'one', 'two': started for so many branches (Hugging Face: the same engine)."""
    steering: tuple[SteeringRequest, ...]
    """Goes around the batch: two make it half and half."""


TOLD = {
    "off_explained": Condition("one", (OFF_EXPLAINED,)),
    "explained": Condition("one", (EXPLAINED,)),
    "explained_tokens": Condition("one", (EXPLAINED_TOKENS,)),
    "edited": Condition("one", (EDITED,)),
}
CONDITIONS = {
    "vllm": {
        "plain": Condition("plain", (OFF,)),
        "off": Condition("one", (OFF,)),
        "one_branch": Condition("one", (ONE,)),
        "two_branches": Condition("two", (TWO,)),
        "mixed": Condition("one", (ONE, OFF)),
        "off_beside_twin": Condition("two", (OFF,)),
        "one_branch_beside_twin": Condition("two", (ONE,)),
        "mixed_two_branches": Condition("two", (TWO, OFF)),
        **TOLD,
    },
    "huggingface": {
        "plain": Condition("plain", (OFF,)),
        "off": Condition("one", (OFF,)),
        "one_branch": Condition("one", (ONE,)),
        "two_branches": Condition("two", (TWO,)),
        "exact": Condition("two", (EXACT,)),
        **TOLD,
        "two_full_passes": Condition(LOOP, (EXACT,)),
    },
}
DEFAULT_CONDITIONS = {
    "vllm": ("plain", "off", "one_branch", "two_branches", "mixed"),
    "huggingface": ("plain", "off", "one_branch", "two_branches", "exact", "two_full_passes"),
}


def fits(condition: Condition, batch: int) -> bool:
    """Half of a batch of one is nothing; the loop runs one sequence."""
    return batch % len(condition.steering) == 0 and (condition.engine != LOOP or batch == 1)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all engines of a comparison share."""

    kind: str
    """'vllm' or 'huggingface'."""
    shape: LlavaShape
    device: str
    dtype: str
    threads: int
    """Of every engine, on a CPU."""
    compile: bool
    """vLLM on a CPU: torch.compile."""
    new_tokens: int
    largest_batch: int

    @property
    def prompt_tokens(self) -> int:
        return len(PROMPT) - len(IMAGE_MARK) + self.shape.image_tokens

    @property
    def context_tokens(self) -> int:
        return math.ceil((self.prompt_tokens + self.new_tokens + 1) / BLOCK_TOKENS) * BLOCK_TOKENS

    @property
    def kv_cache_bytes(self) -> int:
        """The same for every engine: a quarter more than the largest batch needs where two branches are kept."""
        caches = self.shape.layers + self.shape.pooling_layers + 1
        needed = self.largest_batch * self.context_tokens * caches * self.shape.cache_bytes(self.dtype)
        return max(GIB, int(1.25 * needed))


@dataclass(frozen=True, kw_only=True)
class Contestants:
    """Engines that run beside each other and idle when not asked."""

    model: Path
    artifact: Path
    engines: Mapping[str, Engine]


@asynccontextmanager
async def running_engines(setup: Setup, names: set[str], folder: Path) -> AsyncIterator[Contestants]:
    """Write a random checkpoint with its artifact and start the named engines on it; stop them at the end."""
    model = save_random_llava(
        folder / "model", setup.shape, dtype=setup.dtype, max_tokens=setup.context_tokens, device=setup.device
    )
    artifact = save_random_artifact(folder / "artifact", setup.shape, device=setup.device)
    async with AsyncExitStack() as stack:
        engines: dict[str, HuggingFaceEngine | VllmEngine] = {}
        for name in sorted(names - {LOOP}):
            if setup.kind == "huggingface" and {"one", "two"} & set(engines) and name != "plain":
                engines[name] = next(engine for other, engine in engines.items() if other != "plain")
                continue
            engines[name] = _make_engine(setup, model, None if name == "plain" else artifact, 2 if name == "two" else 1)
        different = {id(engine): engine for engine in engines.values()}.values()
        for engine in different:
            stack.push_async_callback(engine.stop)
        await asyncio.gather(*(_start(engine, place * START_APART_S) for place, engine in enumerate(different)))
        yield Contestants(model=model, artifact=artifact, engines=engines)


async def _start(engine: Engine, delay_s: float) -> None:
    await asyncio.sleep(delay_s)
    await engine.start()


def make_requests(
    contestants: Contestants, condition: Condition, setup: Setup, *, batch: int, name: str, first_seed: int
) -> list[GenerationRequest]:
    """One request per place in the batch, each with a picture that no cache has seen."""
    tokenizer = next(iter(contestants.engines.values())).processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    prompt = tuple(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    return [
        GenerationRequest(
            request_id=f"{name}-{index}",
            prompt_token_ids=prompt,
            images=(noise(first_seed + index, setup.shape.image_size),),
            sampling=Sampling(max_tokens=setup.new_tokens, temperature=0.0),
            steering=merge_sources(condition.steering[index % len(condition.steering)]),
        )
        for index in range(batch)
    ]


@dataclass(frozen=True, kw_only=True)
class CacheMemory:
    """Keys and values of one vLLM engine."""

    caches: int
    """Attention layers that hold any: the decoder's, pooling, the steered branch's tail."""
    bytes_per_token: int
    tokens_that_fit: int
    """Into `kv_cache_bytes`, in whole blocks."""


def read_cache_memory(engine: Engine, setup: Setup) -> CacheMemory | None:
    """As vLLM divided its memory into blocks; None for an engine without any."""
    if not isinstance(engine, VllmEngine):
        return None
    assert engine._vllm is not None
    cache = engine._vllm.vllm_config.cache_config
    blocks, block_tokens = cache.num_gpu_blocks, cache.block_size
    assert blocks is not None
    per_token_and_cache = setup.shape.cache_bytes(setup.dtype)
    caches = setup.kv_cache_bytes // (blocks * block_tokens * per_token_and_cache)
    return CacheMemory(
        caches=caches, bytes_per_token=caches * per_token_and_cache, tokens_that_fit=blocks * block_tokens
    )


def _make_engine(setup: Setup, model: Path, artifact: Path | None, branches: int) -> HuggingFaceEngine | VllmEngine:
    if setup.kind == "huggingface":
        return HuggingFaceEngine(
            model, artifact, device=setup.device, dtype=setup.dtype, max_batch_size=setup.largest_batch
        )
    return VllmEngine(
        model,
        artifact,
        device=setup.device,
        dtype=setup.dtype,
        max_batch_size=setup.largest_batch,
        branches=branches,
        cpu_threads=setup.threads,
        gpu_memory_share=0.3,
        compile=setup.compile,
        vllm_arguments={"kv_cache_memory_bytes": setup.kv_cache_bytes},
    )
