"""What does the service itself cost? Time to the first token through HTTP, and from the same engine called in process.

    python -m tests.benchmarks.serving.service_overhead --json FILE
    python -m tests.benchmarks.serving.service_overhead --random   # a random LLaVA of 24 layers, not the miniature

Three ways to the same first token, each on one thread and idle while another is asked: `http`, from opening a
connection to the first text of a stream (HTTP, Ray Serve twice, validation, the image's decoding); `replica`, the
service's own model replica in this process (tokenising and the context check); `engine`, the engine in this process,
given tokens and pixels. Every round asks each of them once about each of `--items` scenes, in rotating order; a round's
value is the median over its scenes. The engine is Hugging Face's, where no cache could remember a picture.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from service.chat.request import sampling_of, turns_of
from service.chat.schemas import ChatCompletionRequest
from service.chat.steering_sources import merge_steering
from service.http.body import parse
from service.images.decoder import RgbImage
from service.model.job import ModelJob
from service.model.replica import ModelReplica
from service.settings import Settings
from steering.engines.base import GenerationRequest, TextDelta
from tests.benchmarks.serving.open_loop import Asked, ask, scenes
from tests.benchmarks.serving.running_service import RunningService, running_service
from tests.benchmarks.steering.overhead import SHAPES
from tests.benchmarks.steering.random_llava import save_random_artifact, save_random_llava
from training.evaluation.manifest import describe_run
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.miniature.paths import ARTIFACT, LLAVA

WAYS = ("http", "replica", "engine")
TOKENS = 8
MIN_ROUNDS = 7


def make_jobs(asked: Asked, settings: Settings) -> list[ModelJob]:
    """What the ingress makes of the bodies: the same requests, without HTTP."""
    jobs = []
    pictures = miniature_benchmark(captions=len(asked.bodies), questions=0, seed=0, scene_range="dev").scenes
    for number, (body, scene) in enumerate(zip(asked.bodies, pictures, strict=True)):
        chat, picture = parse(body, ChatCompletionRequest), scene.image.convert("RGB")
        jobs.append(
            ModelJob(
                request_id=f"job-{number}",
                turns=turns_of(chat),
                images=(RgbImage(picture.width, picture.height, picture.tobytes()),),
                max_tokens=chat.max_tokens,
                sampling=sampling_of(chat),
                steering=merge_steering(None, None, "", settings),
                tenant="",
            )
        )
    return jobs


class Comparison:
    """The three ways, asked one at a time."""

    def __init__(self, service: RunningService, replica: ModelReplica, asked: Asked, jobs: list[ModelJob]) -> None:
        self._port, self._replica, self._asked, self._jobs = service.port, replica, asked, jobs
        self._prepared = [replica.prepare(job)[0] for job in jobs]
        self._number = 0

    async def first_token_s(self, way: str, item: int) -> float:
        ways: dict[str, Callable[[int], Awaitable[float]]] = {
            "http": self._by_http,
            "replica": self._by_replica,
            "engine": self._by_engine,
        }
        self._number += 1
        return await ways[way](item)

    async def _by_http(self, item: int) -> float:
        outcome = await ask(self._port, self._asked, item)
        if outcome.ending != "complete" or outcome.first_token_s is None:
            raise RuntimeError(f"the service answered {outcome.ending}")
        return outcome.first_token_s

    async def _by_replica(self, item: int) -> float:
        return await _first_text(self._replica.generate(replace(self._jobs[item], request_id=f"r{self._number}")))

    async def _by_engine(self, item: int) -> float:
        request: GenerationRequest = replace(self._prepared[item], request_id=f"e{self._number}")
        return await _first_text(self._replica._engine.generate(request))


async def _first_text(events: Any) -> float:
    """Seconds to the first text; the rest is generated, too, as over HTTP."""
    began, first = time.perf_counter(), None
    async with aclosing(events):
        async for event in events:
            if first is None and isinstance(event, TextDelta) and event.text:
                first = time.perf_counter() - began
    if first is None:
        raise RuntimeError("an answer without text")
    return first


async def measure(service: RunningService, model: Path, artifact: Path, options: argparse.Namespace) -> dict[str, Any]:
    settings = Settings(model=str(model), artifact=str(artifact))
    asked = scenes(settings.model_name, options.items, TOKENS)
    replica = ModelReplica(settings)
    await replica.start()
    rounds: dict[str, list[float]] = {way: [] for way in WAYS}
    try:
        comparison = Comparison(service, replica, asked, make_jobs(asked, settings))
        for number in range(-1, options.rounds):  # the first is a warm-up
            values: dict[str, list[float]] = {way: [] for way in WAYS}
            for item in range(options.items):
                shift = (number + item) % len(WAYS)
                for way in (*WAYS[shift:], *WAYS[:shift]):
                    values[way].append(await comparison.first_token_s(way, item))
            if number >= 0:
                for way in WAYS:
                    rounds[way].append(statistics.median(values[way]))
    finally:
        await replica.stop()
    return make_report(rounds, options)


def make_report(rounds: dict[str, list[float]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians of the rounds' ratios and differences; the spread is their smallest and largest."""
    shown = {
        "http_over_engine": _by_round(rounds, "http", "engine", lambda ours, theirs: ours / theirs),
        "replica_over_engine": _by_round(rounds, "replica", "engine", lambda ours, theirs: ours / theirs),
        "http_minus_engine_ms": _by_round(rounds, "http", "engine", lambda ours, theirs: (ours - theirs) * 1000),
        "replica_minus_engine_ms": _by_round(rounds, "replica", "engine", lambda ours, theirs: (ours - theirs) * 1000),
    }
    return {
        "ratios": {name: round(statistics.median(values), 3) for name, values in shown.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in shown.items()},
        "table": [
            {"way": way, "first_token_ms": round(statistics.median(values) * 1000, 2)} for way, values in rounds.items()
        ],
        "manifest": describe_run({name: str(value) for name, value in vars(options).items()})
        | {"cpus": os.cpu_count(), "spread": "smallest and largest of the rounds"},
    }


def _by_round(
    rounds: dict[str, list[float]], ours: str, theirs: str, compare: Callable[[float, float], float]
) -> list[float]:
    return [compare(one, other) for one, other in zip(rounds[ours], rounds[theirs], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds; at least 7")
    parser.add_argument("--items", type=int, default=20, help="scenes asked about in every round")
    parser.add_argument("--random", action="store_true", help="a random LLaVA of 24 layers of 1024")
    options = parser.parse_args()
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds: a median of fewer than {MIN_ROUNDS} rounds says too little")
    with tempfile.TemporaryDirectory() as folder:
        model, artifact = LLAVA, ARTIFACT
        if options.random:
            model = save_random_llava(Path(folder) / "llava", SHAPES["default"])
            shutil.copy(LLAVA / "chat_template.jinja", model)
            artifact = save_random_artifact(Path(folder) / "artifact", SHAPES["default"])
        with running_service("--model", str(model), "--artifact", str(artifact)) as service:
            report = asyncio.run(measure(service, model, artifact, options))
    for row in report["table"]:
        print(f"{row['way']:>8}: {row['first_token_ms']:8.2f} ms to the first token")
    for name, value in report["ratios"].items():
        print(f"{name}: {value} {report['spread'][name]}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
