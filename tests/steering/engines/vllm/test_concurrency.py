"""Many requests at once, some given up midway: every second answer is the one it gets alone, and nothing is left."""

from __future__ import annotations

import asyncio
import random

from steering.errors import EngineUnavailable
from tests.steering.engines.driving import make_request, send
from tests.steering.engines.vllm.agreement import VOCABULARY, assert_agree

REQUESTS, CANCELLED = 64, 6


def random_request(engine, rng: random.Random, index: int):
    settings = {
        "strength": rng.choice([0.0, rng.random(), 1.0]),
        "form": rng.choice(["published", "difference", "union"]),
        "alpha": rng.uniform(0, 4),
        "beta_up": rng.random(),
        "beta_down": rng.random(),
        "gamma": rng.choice([1.0, rng.random()]),
        "plausibility": rng.choice([0.0, 0.0, rng.random()]),
        "min_answer_tokens": rng.choice([None, None, 0, 3]),
    }
    images = tuple(rng.sample(range(20), rng.choice([1, 1, 2])))
    text = f"{index}: " + "z" * rng.randrange(60)
    chosen = settings if rng.random() > 0.2 else {"enabled": False}
    return make_request(engine, text, images, chosen, max_tokens=rng.randrange(4, 24), top_logprobs=VOCABULARY)


async def give_up_midway(engine, request, closing: bool) -> None:
    """Either close the stream or cancel by id."""
    stream = engine.generate(request)
    await anext(stream)
    if closing:
        await stream.aclose()
        return
    engine.cancel(request.request_id)
    try:
        async for _ in stream:
            pass
    except EngineUnavailable:
        return


async def assert_nothing_left(engine) -> None:
    """No sequence state in the worker; all but the prefix cache's blocks free again once the engine is asked anew."""
    assert await engine.vllm.collective_rpc("count_steered_sequences") == [0]
    assert engine.vllm.get_num_unfinished_requests() == 0
    await engine.vllm.reset_prefix_cache()
    await send(engine, make_request(engine, steering={"enabled": False}, max_tokens=2))
    assert engine.progress.kv_cache_usage == 0
    assert (engine.progress.running, engine.progress.waiting) == (0, 0)


async def test_64_requests_with_random_settings(engine):
    rng = random.Random(7)
    requests = [random_request(engine, rng, index) for index in range(REQUESTS)]
    abandoned = [
        make_request(engine, f"given up {index}", steering={"gamma": 0.5 + 0.1 * index}, max_tokens=150,
                     logit_bias={257: -100.0})
        for index in range(CANCELLED)
    ]  # fmt: skip
    together = [asyncio.create_task(send(engine, request)) for request in requests]
    giving_up = [
        asyncio.create_task(give_up_midway(engine, request, closing=index % 2 == 0))
        for index, request in enumerate(abandoned)
    ]
    answers = await asyncio.gather(*together)
    await asyncio.gather(*giving_up)
    await assert_nothing_left(engine)
    alone = [await send(engine, request) for request in requests[::2]]
    assert_agree(answers[::2], alone)
    for ours, solo in zip(answers[::2], alone, strict=True):
        assert ours.end.receipt.applied == solo.end.receipt.applied
        assert ours.end.receipt.reason == solo.end.receipt.reason
    assert sum(answer.end.receipt.applied for answer in answers) > REQUESTS / 3
    await assert_nothing_left(engine)
