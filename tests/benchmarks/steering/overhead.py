r"""What does steering cost? A random LLaVA, plain and steered, on one machine in one run.

    python -m tests.benchmarks.steering.overhead --json FILE --plot FILE.png
    python -m tests.benchmarks.steering.overhead --shape gqa
    python -m tests.benchmarks.steering.overhead --shape 7b --device cuda --dtype bfloat16 --batches 1 8 32 \
        --new-tokens 64 --conditions plain off one_branch mixed off_beside_twin two_branches
    python -m tests.benchmarks.steering.overhead --engine huggingface

Measured: generated tokens a second over whole requests (prefill, decoding, receipts), the same while decoding, time to
first token, time between tokens, and the memory of keys and values. `plain` is vLLM without the plugin; `off` asks a
steered engine not to steer; `one_branch`, `two_branches` and `mixed` (every other request off) steer. `plain`, the
engine for one branch (`off`, `one_branch`, `mixed`) and the one for two (`two_branches`) run beside each other, each in
a process of its own, and idle when not asked. Every round asks every condition once at every batch size, in rotating
order, with the same prompt, as many new tokens and pictures that no cache has seen; ratios are to `plain` of the same
round. With `--engine huggingface` everything is in this process, and the procedure as published, two passes over the
whole sequence for every token without a cache, is timed beside.

Requests are short by default, so that seven rounds end in 20 minutes on two cores: 98 tokens of prompt (a picture of
112 px is 64 tokens) and 16 new ones, the proportion of LLaVA-1.5's 610 and 100, which are `--image-size 336
--new-tokens 100`. `--shape gqa` takes half as long again; `--batches 1 8` halves either.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from steering.artifact import load_artifact
from steering.request import merge_sources
from steering.settings import resolve
from tests.benchmarks.steering.generation_timing import Timing, time_batch, time_loop
from tests.benchmarks.steering.overhead_conditions import (
    CONDITIONS,
    DEFAULT_CONDITIONS,
    EXACT,
    LOOP,
    Contestants,
    Setup,
    fits,
    make_requests,
    read_cache_memory,
    running_engines,
)
from tests.benchmarks.steering.overhead_report import Comparison, make_report, plot, print_report
from tests.benchmarks.steering.random_llava import LlavaShape
from tests.benchmarks.steering.two_full_passes import TwoFullPasses

SHAPES = {
    "default": LlavaShape(
        layers=24, hidden=1024, head_size=128, kv_heads=8, intermediate=2752, vocabulary=8192, concepts=8192,
        active_concepts=64, image_size=112,
    ),
    "gqa": LlavaShape(
        layers=28, hidden=896, head_size=32, kv_heads=4, intermediate=4736, vocabulary=7168, concepts=7168,
        active_concepts=56, image_size=112,
    ),
    "7b": LlavaShape(
        layers=32, hidden=4096, head_size=128, kv_heads=32, intermediate=11008, vocabulary=32064, concepts=32768,
        active_concepts=256, image_size=336,
    ),
}  # fmt: skip
"""'default': LLaVA-1.5's proportions (MLP 2.7 D, K = 8 D, k = K / 128) at a quarter of 7B's width and fewer layers.
'gqa': Qwen2.5-7B's counts (28 layers, 28 heads, 4 kv heads: D takes seven pooling layers) at a quarter of its width.
'7b': LLaVA-1.5-7B itself, for a GPU (three engines of it take 100 GB)."""
MIN_ROUNDS = 7


async def compare(name: str, setup: Setup, settings: argparse.Namespace) -> Comparison:
    """All rounds of one shape on one kind of engine."""
    chosen = settings.conditions or DEFAULT_CONDITIONS[setup.kind]
    conditions = {label: CONDITIONS[setup.kind][label] for label in chosen}
    comparison = Comparison(shape_name=name, setup=setup)
    with tempfile.TemporaryDirectory(prefix="steering_overhead_") as folder:
        started = time.perf_counter()
        async with running_engines(setup, {one.engine for one in conditions.values()}, Path(folder)) as contestants:
            loop = _make_loop(setup, contestants) if "two_full_passes" in conditions else None
            for label, condition in conditions.items():
                engine = contestants.engines.get(condition.engine)
                memory = read_cache_memory(engine, setup) if engine else None
                if memory:
                    comparison.memory[label] = memory
            print(f"{name}, {setup.kind}: engines started in {time.perf_counter() - started:.0f} s", flush=True)
            for number in range(-1, settings.rounds):  # the first is a warm-up
                started = time.perf_counter()
                for batch in settings.batches:
                    places = [label for label in conditions if fits(conditions[label], batch)]
                    turn = number % len(places)
                    for label in places[turn:] + places[:turn]:
                        timing = await _time_condition(label, batch, number, setup, contestants, loop)
                        if number >= 0:
                            comparison.timings.setdefault((label, batch), []).append(timing)
                seconds = time.perf_counter() - started
                left = (settings.rounds - number - 1) * seconds / 60
                print(f"round {number + 1} of {settings.rounds}: {seconds:.0f} s, {left:.0f} minutes to go", flush=True)
    return comparison


async def _time_condition(
    label: str, batch: int, number: int, setup: Setup, contestants: Contestants, loop: TwoFullPasses | None
) -> Timing:
    condition = CONDITIONS[setup.kind][label]
    place = list(CONDITIONS[setup.kind]).index(label)
    first_seed = ((number + 1) * len(CONDITIONS[setup.kind]) + place) * 1000 + batch * batch
    name = f"{label}-{batch}-{number}"
    requests = make_requests(contestants, condition, setup, batch=batch, name=name, first_seed=first_seed)
    if condition.engine == LOOP:
        assert loop is not None
        return await asyncio.to_thread(time_loop, loop, requests[0])
    timing = await time_batch(contestants.engines[condition.engine], requests)
    wants_steering = any(one.steering.settings.enabled for one in requests)
    if wants_steering != (timing.steered_positions > 0):
        raise RuntimeError(f"{name}: the receipts count {timing.steered_positions} steered positions")
    return timing


def _make_loop(setup: Setup, contestants: Contestants) -> TwoFullPasses:
    """With the settings of condition 'exact'."""
    presets = load_artifact(contestants.artifact).config.presets
    settings = resolve(merge_sources(EXACT), presets=presets, default_preset="captions", has_image=True)
    return TwoFullPasses(contestants.model, contestants.artifact, settings, device=setup.device, dtype=setup.dtype)


async def measure(settings: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    load_before = os.getloadavg()
    comparisons = []
    for kind in settings.engine:
        for name in settings.shape:
            given = {field.name: getattr(settings, field.name) for field in fields(LlavaShape)}
            setup = Setup(
                kind=kind, shape=replace(SHAPES[name], **{key: value for key, value in given.items() if value}),
                device=settings.device, dtype=settings.dtype, threads=settings.threads, compile=settings.compile,
                new_tokens=settings.new_tokens, largest_batch=max(settings.batches),
            )  # fmt: skip
            comparisons.append(await compare(name, setup, settings))
    described = {name: str(value) for name, value in vars(settings).items()}
    return make_report(comparisons, described, load_averages=[load_before, os.getloadavg()])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--plot", type=Path, help="where a picture of the ratios goes (PNG)")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["default"], help="shapes to measure")
    for field in fields(LlavaShape):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, help=f"{field.name.replace('_', ' ')}, instead of the shape's")
    parser.add_argument("--engine", nargs="+", choices=list(CONDITIONS), default=["vllm"])
    parser.add_argument("--conditions", nargs="+", help="conditions instead of the default ones; 'plain' must be one")
    parser.add_argument("--batches", type=int, nargs="+", help="requests sent at once (1 8 16; Hugging Face: 1)")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="measured rounds, after one of warm-up")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens that every request generates")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every engine")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="vLLM on a CPU: torch.compile (on CUDA always)")
    settings = parser.parse_args()
    if settings.rounds < MIN_ROUNDS:
        parser.error(f"--rounds: a median of fewer than {MIN_ROUNDS} rounds says too little")
    if settings.new_tokens < 2:
        parser.error("--new-tokens: there is no time between tokens of fewer than 2")
    known = set.intersection(*(set(CONDITIONS[kind]) for kind in settings.engine))
    if settings.conditions and ("plain" not in settings.conditions or set(settings.conditions) - known):
        parser.error(f"--conditions: 'plain' and others of {sorted(known)}")
    settings.batches = settings.batches or ([1, 8, 16] if settings.engine == ["vllm"] else [1])
    return settings


def main() -> None:
    settings = parse_arguments()
    report = asyncio.run(measure(settings))
    print_report(report)
    if settings.json:
        settings.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if settings.plot:
        plot(report, settings.plot)


if __name__ == "__main__":
    main()
