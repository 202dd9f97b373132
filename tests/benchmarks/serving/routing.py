"""Does it pay to send requests about one picture to one replica? Two replicas of vLLM on the CPU behind Ray Serve.

    python -m tests.benchmarks.serving.routing --json FILE

A random LLaVA in the published layout, 576 tokens to a picture, unsteered: steering as such changes what may be shared
in the prefix cache, not who has it. Each round has pictures of its own, each asked about several times, in one random
order for both ways: Serve's choice of two at random, and the replica that the picture prefers. The two take turns. Hits
are prompt tokens that vLLM's prefix caches had, as they count them; time to the first token is from the question to the
first event with a token, through Serve's handle. Each round's ratio of the medians is the spread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from contextlib import aclosing
from itertools import product
from pathlib import Path
from typing import Any

from service.images.decoder import RgbImage
from service.model.job import ModelJob, Turn
from service.settings import EngineSettings, Settings
from steering.cluster.local_ray import private_ray
from steering.engines.base import Sampling, TextDelta
from steering.request import SteeringRequest, merge_sources
from tests.benchmarks.steering.random_llava import LlavaShape, noise, save_random_llava
from training.evaluation.manifest import describe_run
from training.miniature.paths import LLAVA

SHAPE = LlavaShape(
    layers=6, hidden=256, head_size=64, kv_heads=4, intermediate=688, vocabulary=2000, concepts=1024,
    active_concepts=32, image_size=336,
)  # fmt: skip
REPLICAS = 2
WAYS = ("spread", "picture")


def start(model: Path) -> Any:
    """A handle to replicas that also tell what their caches had."""
    from ray import serve

    from service.app import BY_PICTURE
    from service.model.replica import ModelReplica

    class Telling(ModelReplica):
        async def __init__(self, settings: Settings) -> None:
            ModelReplica.__init__(self, settings)
            await self.start()

        def cached_tokens(self) -> tuple[int, int]:
            """This process, and the prompt tokens that its cache had since the start."""
            return os.getpid(), self._engine.progress.cached_tokens  # type: ignore[attr-defined]

        async def __del__(self) -> None:
            await self.stop()

    engine = EngineSettings(name="vllm", device="cpu", kv_cache_gib=0.5)
    settings = Settings(model=str(model), artifact=None, steering="off", engine=engine, routing="picture")
    deployment = serve.deployment(Telling, name="Model").options(  # type: ignore[arg-type]
        num_replicas=REPLICAS, max_ongoing_requests=128, request_router_config=BY_PICTURE
    )
    return serve.run(deployment.bind(settings), name="routing", route_prefix=None)


def jobs(seed: int, settings: argparse.Namespace) -> list[ModelJob]:
    """Of one round, in their order."""
    chance = random.Random(seed)
    pictures = []
    for number in range(settings.pictures):
        drawn = noise(seed * 1000 + number, SHAPE.image_size)
        pictures.append(RgbImage(*drawn.size, drawn.tobytes()))
    asked = list(product(pictures, range(settings.questions)))
    chance.shuffle(asked)
    return [
        ModelJob(
            request_id=f"{seed}-{index}", turns=(Turn("user", (None, f"question {question} ?")),), images=(picture,),
            max_tokens=2, sampling=Sampling(max_tokens=2, temperature=0),
            steering=merge_sources(server=(SteeringRequest(enabled=False),)), tenant="benchmark",
        )
        for index, (picture, question) in enumerate(asked)
    ]  # fmt: skip


async def hits(handle: Any) -> int:
    """Of all replicas; which one answers is Serve's choice, so all are asked until each has."""
    told: dict[int, int] = {}
    while len(told) < REPLICAS:
        told.update([await handle.cached_tokens.remote()])
    return sum(told.values())


async def one_round(handle: Any, way: str, seed: int, settings: argparse.Namespace) -> dict[str, float]:
    from service.model.client import RayModelClient

    client = RayModelClient(handle, by_picture=way == "picture")
    waiting, times, tokens = asyncio.Semaphore(settings.clients), [], []
    before = await hits(handle)

    async def ask(job: ModelJob) -> None:
        async with waiting:
            began, first = time.monotonic(), None
            async with aclosing(client.generate(job)) as events:
                async for event in events:
                    if first is None and isinstance(event, TextDelta) and event.token_ids:
                        first = time.monotonic() - began
                    tokens.append(getattr(event, "prompt_tokens", 0))
            assert first is not None
            times.append(first)

    await asyncio.gather(*(ask(job) for job in jobs(seed, settings)))
    await asyncio.sleep(0.5)  # the last step's numbers
    asked = sum(tokens) / 2  # both the start and the end of an answer tell
    return {"hit_rate": (await hits(handle) - before) / asked, "first_token_s": statistics.median(times)}


async def measure(handle: Any, settings: argparse.Namespace) -> dict[str, Any]:
    await one_round(handle, "spread", 1, settings)  # warms up
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(settings.rounds):
        for place, way in enumerate(WAYS if number % 2 else WAYS[::-1]):
            rounds[way].append(await one_round(handle, way, 2 + 2 * number + place, settings))
            print(number, way, rounds[way][-1], flush=True)
    ratios = [one["first_token_s"] / other["first_token_s"] for one, other in zip(*rounds.values(), strict=True)]
    table = [
        {"routing": way, **{name: round(statistics.median(one[name] for one in found), 4) for name in found[0]}}
        for way, found in rounds.items()
    ]
    name = "first_token_spread_over_picture"
    ratios.sort()
    return {
        "ratios": {name: round(statistics.median(ratios), 3)},
        "spread": {name: [round(ratios[0], 3), round(ratios[-1], 3)]},
        "table": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--rounds", type=int, default=7, help="of each way")
    parser.add_argument("--pictures", type=int, default=12, help="of one round")
    parser.add_argument("--questions", type=int, default=4, help="about each picture")
    parser.add_argument("--clients", type=int, default=2, help="requests at a time")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, private_ray(cpus=REPLICAS, gpus=0):
        model = save_random_llava(Path(folder) / "llava", SHAPE)
        shutil.copy(LLAVA / "chat_template.jinja", model)
        report = asyncio.run(measure(start(model), settings))
    report["manifest"] = describe_run({name: str(value) for name, value in vars(settings).items()}) | {
        "cpus": os.cpu_count(), "shape": str(SHAPE), "load_average": os.getloadavg(),
    }  # fmt: skip
    print(json.dumps({name: report[name] for name in ("ratios", "spread", "table")}, indent=1))
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
