"""How much more do eight concurrent streams give than one? `HuggingFaceEngine`, steered captions, tokens a second.

    python -m tests.benchmarks.steering.concurrent_streams --json FILE

Rounds alternate between one stream and eight, so that a machine that slows down slows both. Every stream captions its
own scene and is run to `--tokens` tokens: the end-of-sequence token is forbidden, so that all do the same work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoProcessor

from steering.engines.base import GenerationEnd, GenerationRequest, Sampling
from steering.engines.huggingface.engine import HuggingFaceEngine
from steering.request import RequestedSteering, SteeringRequest
from training.evaluation.benchmark import Benchmark
from training.evaluation.manifest import describe_run, weights_digest
from training.evaluation.miniature_benchmark import miniature_benchmark
from training.miniature.paths import ARTIFACT, LLAVA

STREAMS = 8
CONDITIONS = {
    "steered": SteeringRequest(enabled=True, strength=1.0, form="difference", alpha=1.0, beta_up=0.9, beta_down=0.9),
    "plain": SteeringRequest(enabled=False),
}
FORBIDDEN = -100.0
"""Logit bias of the end-of-sequence token."""


async def run_streams(engine: HuggingFaceEngine, requests: list[GenerationRequest]) -> tuple[int, float]:
    """Generated tokens and seconds until the last stream ends."""

    async def one(request: GenerationRequest) -> int:
        async for event in engine.generate(request):
            if isinstance(event, GenerationEnd):
                return sum(event.completion_tokens)
        raise AssertionError("a generation ended without GenerationEnd")

    started = time.perf_counter()
    tokens = await asyncio.gather(*(one(request) for request in requests))
    return sum(tokens), time.perf_counter() - started


def make_requests(
    benchmark: Benchmark, processor: Any, *, count: int, tokens: int, name: str, steering: SteeringRequest
) -> list[GenerationRequest]:
    turn = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": benchmark.caption_prompt}],
    }
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    return [
        GenerationRequest(
            request_id=f"{name}-{index}",
            prompt_token_ids=tuple(processor.tokenizer(prompt).input_ids),
            images=(benchmark.scenes[index].image,),
            sampling=Sampling(
                max_tokens=tokens, temperature=0.0, logit_bias={processor.tokenizer.eos_token_id: FORBIDDEN}
            ),
            steering=RequestedSteering(settings=steering),
        )
        for index in range(count)
    ]


async def measure(settings: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    benchmark = miniature_benchmark(captions=STREAMS, questions=0, seed=0, scene_range="dev")
    processor = AutoProcessor.from_pretrained(settings.model)
    engine = HuggingFaceEngine(model=str(settings.model), artifact=str(settings.artifact), max_batch_size=STREAMS)
    await engine.start()
    rates: dict[tuple[str, int], list[float]] = {}
    try:
        for number in range(-1, settings.rounds):  # the first is a warm-up
            for label, steering in CONDITIONS.items():
                for count in (1, STREAMS):
                    requests = make_requests(
                        benchmark,
                        processor,
                        count=count,
                        tokens=settings.tokens,
                        name=f"{number}-{label}-{count}",
                        steering=steering,
                    )
                    tokens, seconds = await run_streams(engine, requests)
                    if number >= 0:
                        rates.setdefault((label, count), []).append(tokens / seconds)
    finally:
        await engine.stop()
    return make_report(rates, settings)


def make_report(rates: dict[tuple[str, int], list[float]], settings: argparse.Namespace) -> dict[str, Any]:
    """Medians of the rounds' ratios; the spread is their smallest and largest."""
    by_round = {
        f"{label}_eight_to_one": [
            eight / one for one, eight in zip(rates[label, 1], rates[label, STREAMS], strict=True)
        ]
        for label in CONDITIONS
    }
    table = [
        {"condition": label, "streams": count, "tokens_per_second": round(statistics.median(values), 1)}
        for (label, count), values in rates.items()
    ]
    return {
        "ratios": {name: round(statistics.median(values), 3) for name, values in by_round.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in by_round.items()},
        "table": table,
        "manifest": describe_run({name: str(value) for name, value in vars(settings).items()})
        | {"model_sha256": weights_digest(settings.model), "cpus": os.cpu_count()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--model", type=Path, default=LLAVA, help="folder of the LVLM")
    parser.add_argument("--artifact", type=Path, default=ARTIFACT, help="folder of the artifact")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds; at least 7")
    parser.add_argument("--tokens", type=int, default=128, help="tokens generated by every stream")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    settings = parser.parse_args()
    if settings.rounds < 7:
        parser.error("--rounds: a median of fewer than 7 rounds says too little")
    report = asyncio.run(measure(settings))
    for row in report["table"]:
        print(f"{row['condition']:>8}, {row['streams']} streams: {row['tokens_per_second']:8.1f} tokens/s")
    for name, value in report["ratios"].items():
        print(f"{name}: {value} {report['spread'][name]}")
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
