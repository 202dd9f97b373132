"""Does the paper's procedure make a model invent less, and is it the image that does it?

    python -m tests.benchmarks.hallucination.published_procedure --json FILE
    python -m tests.benchmarks.hallucination.published_procedure --model M --artifact A --device cuda --dtype bfloat16 \
        --benchmark pope --pope-files coco_pope_*.json --images val2014 \
        --question-suffix 'Please answer this question with one word.'

Form `published`, mode exact, gamma .6, plausibility .8; captions with the preset paper_chair, questions with
paper_pope; sampled at temperature 1 as in the paper, and greedily. Beside it stand the same decoding without deltas (a
plausibility of .8 alone is nearly greedy), other scenes' images, and random directions of the same size. A ratio is the
paper's value by that of the same decoding; its spread is the paired 95 % interval of their difference, by that value.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pydantic import Field

from steering.artifact_config import read_config
from steering.request import Control, SteeringRequest
from training.command_line import parse_settings, run_stage
from training.durable_files import write_json
from training.evaluation.asking import GREEDY, Decoding
from training.evaluation.benchmark import Benchmark
from training.evaluation.benchmark_settings import BenchmarkSettings, TurnsName, build_benchmark
from training.evaluation.conditions import TASKS, Condition, Task, as_request, control_seeds
from training.evaluation.engines import EngineSettings, respondent
from training.evaluation.manifest import describe_benchmark, describe_run, weights_digest
from training.evaluation.measuring import measure
from training.evaluation.scores import RESAMPLES, Scoreboard, Scores, as_field
from training.evaluation.table import caption_table, question_table
from training.tune_presets import PAPER_PRESETS

AGAINST = ("decoding_only", "other_image", "random", "plain")
"""What the paper's procedure is compared with."""


class ProcedureSettings(EngineSettings, BenchmarkSettings):
    """The paper's procedure with its controls, at temperature 1 and greedily."""

    captions: int | None = Field(default=300, ge=0)
    """Pictures captioned."""
    questions: int | None = Field(default=600, ge=0)
    """Questions per POPE split; even."""
    turns: TurnsName | None = "first"
    """In which turn questions are asked; the paper's: with the picture."""
    sampling_seed: int = Field(default=0, ge=0)
    """Seeds the drawing of tokens; a scene draws alike under every condition."""
    resamples: int = Field(default=RESAMPLES, ge=100)
    """Bootstrap resamples."""
    json_file: Path | None = Field(default=None, alias="json")
    """Where the report goes."""


def procedure() -> list[Condition]:
    """The paper's presets spelled out, since an artifact need not hold them, and their controls."""
    found = [
        Condition(name="plain", requests=dict.fromkeys(TASKS, SteeringRequest(enabled=False))),
        Condition(name="decoding_only", requests=_requests(gamma=0.0)),
        Condition(name="paper", requests=_requests()),
    ]
    controls: tuple[Control, ...] = ("other_image", "random")
    for control in controls:
        found.append(Condition(name=control, requests=_requests(control), seeds=control_seeds(control)))
    return found


def _requests(control: Control | None = None, **changed: float) -> dict[Task, SteeringRequest]:
    return {
        task: as_request(preset.model_copy(update=changed), control=control) for preset, task in PAPER_PRESETS.values()
    }


async def run(settings: ProcedureSettings) -> dict[str, Any]:
    """Both decodings under all conditions."""
    benchmark = build_benchmark(settings)
    decodings = {"temperature_1": Decoding(temperature=1.0, sampling_seed=settings.sampling_seed), "greedy": GREEDY}
    boards = {}
    async with respondent(settings) as answers:
        for name, decoding in decodings.items():
            print(f"== {name}", flush=True)
            measured = {
                condition.name: await measure(
                    benchmark, condition, answers, concurrency=2 * settings.batch, decoding=decoding
                )
                for condition in procedure()
            }
            boards[name] = Scoreboard(measured, seed=settings.seed, resamples=settings.resamples)
    for name, board in boards.items():
        print(f"\n== {name}\n\n{tables(benchmark, board)}")
    ratios = {f"{name}_{metric}": found for name, board in boards.items() for metric, found in ratios_of(board)}
    return {
        "ratios": {name: ratio for name, (ratio, _, _) in ratios.items()},
        "spread": {name: [low, high] for name, (_, low, high) in ratios.items()},
        "table": [{"decoding": name} | row for name, board in boards.items() for row in rows(board)],
        "manifest": describe_run(settings.model_dump(mode="json"))
        | {"benchmark": describe_benchmark(benchmark), "artifact": read_config(settings.artifact).fingerprint}
        | {"presets": {name: preset.model_dump(exclude={"dev_scores"}) for name, (preset, _) in PAPER_PRESETS.items()}}
        | {"decodings": {name: asdict(decoding) for name, decoding in decodings.items()}}
        | {"model_sha256": weights_digest(settings.model)},
    }


def tables(benchmark: Benchmark, board: Scoreboard) -> str:
    """Scores of all conditions, and what the paper's procedure differs by, for a terminal."""
    scores = {condition.name: board.scores(condition.name) for condition in procedure()}
    parts = [caption_table(scores)] * bool(benchmark.captions) + [question_table(scores)] * bool(benchmark.questions)
    changes = {f"paper - {other}": board.difference("paper", other) for other in AGAINST}
    parts += [caption_table(changes)] * bool(benchmark.captions)
    parts += [question_table(changes)] * bool(benchmark.questions)
    return "\n\n".join(parts)


def values(scores: Scores) -> dict[str, Any]:
    """The metrics that the paper reports, by name."""
    chair = {name: scores.chair[name] for name in ("chair_s", "chair_i", "recall") if name in scores.chair}
    return chair | {
        f"pope_{as_field(asked)}_{name}": metrics[name]
        for asked, metrics in scores.questions.items()
        for name in ("accuracy", "f1")
    }


def ratios_of(board: Scoreboard) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """The paper's procedure by the same decoding; a metric that is 0 there has none."""
    change = values(board.difference("paper", "decoding_only"))
    for name, base in values(board.scores("decoding_only")).items():
        if base.value > 0:
            value, low, high = (round(1 + part / base.value, 4) for part in change[name])
            yield name, (value, low, high)


def rows(board: Scoreboard) -> Iterator[dict[str, Any]]:
    """Every number with its interval."""
    found = {condition.name: board.scores(condition.name) for condition in procedure()}
    found |= {f"paper_minus_{other}": board.difference("paper", other) for other in AGAINST}
    for name, scores in found.items():
        for metric, interval in values(scores).items():
            yield {"condition": name, "metric": metric} | interval._asdict()


def main() -> None:
    settings = parse_settings(ProcedureSettings, program="published_procedure.py", description=__doc__)
    report = asyncio.run(run(settings))
    for name, ratio in report["ratios"].items():
        print(f"{name}: {ratio} {report['spread'][name]}")
    if settings.json_file:
        write_json(settings.json_file, report)


if __name__ == "__main__":
    run_stage(main)
