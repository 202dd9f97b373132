"""Stage 6: does steering make an LVLM invent less, and is it the image that does it?

    python -m training.evaluate_hallucination --benchmark miniature --captions 1000 --questions 2000 --json report.json
    python -m training.evaluate_hallucination --benchmark pope --pope-files coco_pope_*.json --images val2014 ...
    python -m training.evaluate_hallucination --benchmark coco --annotations annotations --images val2014 ...

Runs the conditions of `training.evaluation.conditions` on scenes that nothing was trained or tuned on, CHAIR on
captions and POPE on yes/no questions of first and second turns, each number with a paired-bootstrap interval, and says
in words what they show.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from steering.artifact_config import read_config
from steering.request import Mode
from training.command_line import parse_settings, run_stage
from training.durable_files import write_json
from training.evaluation.asking import Decoding
from training.evaluation.benchmark import Benchmark
from training.evaluation.benchmark_settings import BenchmarkSettings, build_benchmark
from training.evaluation.conditions import NAMES, Condition, conditions, tuned_presets
from training.evaluation.engines import EngineSettings, respondent
from training.evaluation.manifest import describe_benchmark, describe_run, weights_digest
from training.evaluation.measuring import Measurement, measure
from training.evaluation.scores import RESAMPLES, Scoreboard
from training.evaluation.table import caption_table, question_table
from training.evaluation.verdict import verdict

EXAMPLES = 8
"""Captions kept in the report, for reading."""


class EvaluationSettings(EngineSettings, BenchmarkSettings):
    """CHAIR and POPE under steering and its controls, on scenes unused in training, with paired intervals."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    """Of all conditions, plain among them; 0 is greedy. The paper samples at 1."""
    sampling_seed: int = Field(default=0, ge=0)
    """Seeds the drawing of tokens; a scene draws alike under every condition."""
    conditions: tuple[str, ...] = NAMES
    """Conditions to run; `plain` is always among them."""
    mode: Mode | None = None
    """Steering mode instead of the presets' own."""
    resamples: int = Field(default=RESAMPLES, ge=100)
    """Bootstrap resamples."""
    json_file: Path | None = Field(default=None, alias="json")
    """Where the report goes."""


async def evaluate(settings: EvaluationSettings) -> dict[str, Any]:
    """Run everything and return the report."""
    benchmark = build_benchmark(settings)
    described = describe_benchmark(benchmark)
    config = read_config(settings.artifact)
    chosen = conditions(
        tuned_presets(config),
        names=("plain", *settings.conditions),
        mode=settings.mode,
        over_http=settings.engine.startswith("http"),
    )
    decoding = Decoding(temperature=settings.temperature, sampling_seed=settings.sampling_seed)
    measurements = {}
    async with respondent(settings) as answers:
        for number, condition in enumerate(chosen, start=1):
            print(f"[{number}/{len(chosen)}] {condition.name}", flush=True)
            measurements[condition.name] = await measure(
                benchmark, condition, answers, concurrency=2 * settings.batch, decoding=decoding
            )
    manifest = describe_run(settings.model_dump(mode="json"))
    manifest |= {"benchmark": described, "decoding": asdict(decoding), "artifact": config.fingerprint}
    manifest |= {"alignment": config.alignment, "model_sha256": weights_digest(settings.model)}
    return make_report(benchmark, chosen, measurements, manifest, seed=settings.seed, resamples=settings.resamples)


def make_report(
    benchmark: Benchmark,
    chosen: list[Condition],
    measurements: dict[str, Measurement],
    manifest: dict[str, Any],
    *,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Scores, differences, verdict and manifest as one JSON object; prints tables and verdict."""
    board = Scoreboard(measurements, seed=seed, resamples=resamples)
    scores = {condition.name: board.scores(condition.name) for condition in chosen}
    sentences = verdict(board)
    if benchmark.captions:
        print("\n" + caption_table(scores))
    if benchmark.questions:
        print("\n" + question_table(scores))
    print("\n" + "\n".join(f"- {sentence}" for sentence in sentences))
    return {
        "conditions": {
            condition.name: scores[condition.name].as_json() | _record(benchmark, condition, measurements)
            for condition in chosen
        },
        "differences": {
            f"{first}_minus_{second}": board.difference(first, second).as_json() for first, second in board.pairs()
        },
        "verdict": sentences,
        "manifest": manifest,
    }


def _record(benchmark: Benchmark, condition: Condition, measurements: dict[str, Measurement]) -> dict[str, Any]:
    """What was asked under a condition, what the receipts say, and a few captions to read."""
    measured = measurements[condition.name]
    return {
        "requests": {task: asked.model_dump(exclude_none=True) for task, asked in condition.requests.items()},
        "control_seeds": list(condition.seeds),
        "note": condition.note,
        "receipts": measured.receipts,
        "seconds": round(measured.seconds, 1),
        "examples": [
            {"scene": scene.name, "truth": sorted(scene.truth), "caption": caption}
            for scene, caption in list(zip(benchmark.scenes, measured.captions, strict=False))[:EXAMPLES]
        ],
    }


def main() -> None:
    settings = parse_settings(EvaluationSettings, program="python -m training.evaluate_hallucination")
    report = asyncio.run(evaluate(settings))
    if settings.json_file:
        write_json(settings.json_file, report)
        print(f"\nreport: {settings.json_file}")


if __name__ == "__main__":
    run_stage(main)
